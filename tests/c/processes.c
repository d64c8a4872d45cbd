/* One process for each rank, joined by name, on simulated GPUs.
 *
 * host/tests/c_interface.rs compiles this as C99, links it with libpeerlane.so and runs it. Exit
 * status 0: all is right; else the first rank whose process failed, plus 1. */

#define _POSIX_C_SOURCE 200809L
#include "peerlane.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORLD = 3, COUNT = 5000 };

static int check(int rank, peerlane_status status, const char *call) {
    if (status == PEERLANE_OK) return 1;
    fprintf(stderr, "rank %d: %s: %s\n", rank, call, peerlane_last_error());
    return 0;
}

/* A rank's whole life; the name is the group's. */
static int live(int rank, const char *name) {
    char device[32];
    static float data[COUNT];
    peerlane_gpu *gpu = NULL;
    peerlane_comm *comm = NULL;
    void *tensor = NULL;
    int good, index;
    snprintf(device, sizeof device, "sim:%d/%d", rank, WORLD);
    for (index = 0; index < COUNT; index++) data[index] = (float)(rank + index % 7);
    good = check(rank, peerlane_gpu_open(device, &gpu), "open")
        && check(rank, peerlane_join_processes(name, (uint32_t)rank, WORLD, 60000, gpu, NULL, &comm), "join")
        && check(rank, peerlane_gpu_alloc(gpu, sizeof data, &tensor), "alloc")
        && check(rank, peerlane_gpu_upload(gpu, tensor, data, sizeof data, NULL), "upload")
        && check(rank, peerlane_all_reduce(comm, tensor, tensor, COUNT, PEERLANE_F32, PEERLANE_SUM, NULL, NULL), "all_reduce")
        && check(rank, peerlane_comm_synchronize(comm, NULL), "synchronize")
        && check(rank, peerlane_gpu_download(gpu, data, tensor, sizeof data, NULL), "download");
    for (index = 0; good && index < COUNT; index++)
        good = data[index] == (float)(WORLD * (WORLD - 1) / 2 + WORLD * (index % 7));
    good = check(rank, peerlane_comm_close(comm), "close") && good;
    peerlane_comm_destroy(comm);
    good = check(rank, peerlane_gpu_free(gpu, tensor), "free") && good;
    peerlane_gpu_close(gpu);
    return good;
}

int main(void) {
    char name[64];
    pid_t ranks[WORLD];
    int rank, status, failed = 0;
    snprintf(name, sizeof name, "c-processes-%ld", (long)getpid());
    for (rank = 0; rank < WORLD; rank++) {
        ranks[rank] = fork();
        if (ranks[rank] < 0) return 100;
        if (ranks[rank] == 0) return live(rank, name) ? 0 : 1;
    }
    for (rank = WORLD - 1; rank >= 0; rank--) {
        if (waitpid(ranks[rank], &status, 0) != ranks[rank] || status != 0) failed = rank + 1;
    }
    return failed;
}
