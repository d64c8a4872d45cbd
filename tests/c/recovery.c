/* Recovering and going on without a rank, on simulated GPUs: values, generations, errors.
 *
 * host/tests/c_interface.rs compiles this against host/include/peerlane.h, links it with
 * libpeerlane.so and runs it. Exit status 0: all is right; else the first thing that is not was
 * printed. */

#include "check.h"

enum { WORLD = 3, COUNT = 600 };

static peerlane_gpu *gpus[WORLD];
static peerlane_comm *comms[WORLD];
static void *tensors[WORLD];

static void open_group(void) {
    peerlane_config config;
    OK(peerlane_config_init(&config, sizeof config));
    config.deadline_ms = 100;
    config.mailbox_bytes = (size_t)4 << 20;
    config.max_blocks = 2;
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        char name[32];
        snprintf(name, sizeof name, "sim:%u/%u", (unsigned)rank, (unsigned)WORLD);
        OK(peerlane_gpu_open(name, &gpus[rank]));
        OK(peerlane_gpu_alloc(gpus[rank], COUNT * sizeof(float), &tensors[rank]));
    }
    OK(peerlane_connect(gpus, WORLD, &config, comms));
}

/* An all-reduce of ones among `count` ranks, whose GPUs are those from `first` on. */
static void check_sum(peerlane_comm *const *ranks, uint32_t first, uint32_t count) {
    float data[COUNT];
    for (uint32_t rank = 0; rank < count; rank++) {
        void *tensor = tensors[first + rank];
        for (size_t i = 0; i < COUNT; i++) data[i] = 1.0f;
        OK(peerlane_gpu_upload(gpus[first + rank], tensor, data, sizeof data, NULL));
        OK(peerlane_all_reduce(ranks[rank], tensor, tensor, COUNT, PEERLANE_F32, PEERLANE_SUM, NULL, NULL));
    }
    for (uint32_t rank = 0; rank < count; rank++) {
        OK(peerlane_comm_synchronize(ranks[rank], NULL));
        OK(peerlane_gpu_download(gpus[first + rank], data, tensors[first + rank], sizeof data, NULL));
        for (size_t i = 0; i < COUNT; i++) TRUE(data[i] == (float)count);
    }
}

static uint64_t generation(const peerlane_comm *comm) {
    uint64_t found;
    OK(peerlane_generation(comm, &found));
    return found;
}

static void recovers(void) {
    TRUE(generation(comms[0]) == 0);
    OK(peerlane_comm_abort(comms[1]));
    REFUSED(PEERLANE_ABORTED, "rank 0", "aborted", peerlane_barrier(comms[0], NULL));
    OK(peerlane_recover_all(comms, WORLD));
    check_sum(comms, 0, WORLD);
    /* Alone it waits in vain, and what was is still to be mended. */
    REFUSED(PEERLANE_RENDEZVOUS, "in vain", "ranks 1, 2", peerlane_recover(comms[0]));
    REFUSED(PEERLANE_ABORTED, "rank 2", "aborted", peerlane_comm_health(comms[2]));
    OK(peerlane_recover_all(comms, WORLD));
    TRUE(generation(comms[2]) == 2);
    check_sum(comms, 0, WORLD);
}

static void shrinks(void) {
    const uint32_t first[] = {0}, other[] = {7};
    uint32_t found;
    REFUSED(PEERLANE_INVALID_ARGUMENT, "shrink: without", "at least one", peerlane_shrink(comms[1], NULL, 0));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "without", "NULL", peerlane_shrink(comms[1], NULL, 1));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "shrink: without", "[7]", peerlane_shrink(comms[1], other, 1));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "shrink: ranks", "3 of 2", peerlane_shrink_all(comms, WORLD, first, 1));
    OK(peerlane_shrink_all(comms + 1, 2, first, 1));
    OK(peerlane_comm_rank(comms[1], &found));
    TRUE(found == 0);
    OK(peerlane_comm_world_size(comms[2], &found));
    TRUE(found == 2 && generation(comms[2]) == 3);
    check_sum(comms + 1, 1, 2);
    REFUSED(PEERLANE_ABORTED, "rank 0", "aborted", peerlane_comm_health(comms[0]));
    OK(peerlane_comm_close(comms[0]));
    check_sum(comms + 1, 1, 2);
}

static void refuses(void) {
    uint64_t found;
    REFUSED(PEERLANE_INVALID_ARGUMENT, "recover: comm", "NULL", peerlane_recover(NULL));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "generation: comm", "NULL", peerlane_generation(NULL, &found));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "generation: generation", "NULL", peerlane_generation(comms[1], NULL));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "recover_all: world_size", "17", peerlane_recover_all(comms, 17));
    REFUSED(PEERLANE_CLOSED, "recover", "closed", peerlane_recover(comms[0]));
}

int main(void) {
    open_group();
    recovers();
    shrinks();
    refuses();
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        peerlane_comm_destroy(comms[rank]);
        OK(peerlane_gpu_free(gpus[rank], tensors[rank]));
        peerlane_gpu_close(gpus[rank]);
    }
    puts("all is right");
    return 0;
}
