/* Registered tensors on simulated GPUs: values, offsets, ends, errors.
 *
 * host/tests/c_interface.rs compiles this against host/include/peerlane.h, links it with
 * libpeerlane.so and runs it. Exit status 0: all is right; else the first thing that is not was
 * printed. */

#include "check.h"

enum { WORLD = 3, COUNT = 600, BYTES = COUNT * 4, FIRST = 4 };

static peerlane_gpu *gpus[WORLD];
static peerlane_comm *comms[WORLD];
static void *tensors[WORLD];
static peerlane_registration *registrations[WORLD];

static peerlane_status reduce(uint32_t rank, size_t offset, size_t count) {
    return peerlane_all_reduce_registered(comms[rank], registrations[rank], offset, count,
                                          PEERLANE_F32, PEERLANE_SUM, NULL, NULL);
}

static void values(void) {
    float data[COUNT];
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        for (int i = 0; i < COUNT; i++) data[i] = (float)(i + (int)rank);
        OK(peerlane_gpu_upload(gpus[rank], tensors[rank], data, BYTES, NULL));
        OK(reduce(rank, FIRST * 4, COUNT - FIRST));
    }
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        OK(peerlane_comm_synchronize(comms[rank], NULL));
        OK(peerlane_gpu_download(gpus[rank], data, tensors[rank], BYTES, NULL));
        for (int i = 0; i < COUNT; i++) {
            TRUE(data[i] == (float)(i < FIRST ? i + (int)rank : 3 * i + 3));
        }
    }
}

static void errors(void) {
    peerlane_comm *twice[WORLD] = {comms[0], comms[1], comms[1]};
    peerlane_registration *none[WORLD];
    peerlane_reduce_options options;
    REFUSED(PEERLANE_INVALID_ARGUMENT, "offset", "", reduce(0, 8, 1));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "count", "", reduce(0, 16, COUNT));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "registration", "", peerlane_all_reduce_registered(comms[0], registrations[1], 0, 1, PEERLANE_F32,
                                                           PEERLANE_SUM, NULL, NULL));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "registration", "", peerlane_all_reduce_registered(comms[0], NULL, 0, 1, PEERLANE_F32,
                                                           PEERLANE_SUM, NULL, NULL));
    OK(peerlane_reduce_options_init(&options, sizeof options));
    options.algorithm = PEERLANE_ALGORITHM_TWO_SHOT;
    REFUSED(PEERLANE_INVALID_ARGUMENT, "algorithm", "", peerlane_all_reduce_registered(comms[0], registrations[0], 0, 1, PEERLANE_F32,
                                                        PEERLANE_SUM, &options, NULL));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "twice", "", peerlane_register_all(twice, WORLD, tensors, BYTES, none));
    TRUE(none[0] == NULL && none[2] == NULL);
    REFUSED(PEERLANE_INVALID_ARGUMENT, "world_size", "", peerlane_register_all(comms, 17, tensors, BYTES, none));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "bytes", "", peerlane_register_all(comms, WORLD, tensors, BYTES + 1, none));
}

int main(void) {
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        char name[32];
        snprintf(name, sizeof name, "sim:%u/%u", (unsigned)rank, (unsigned)WORLD);
        OK(peerlane_gpu_open(name, &gpus[rank]));
        OK(peerlane_gpu_alloc(gpus[rank], BYTES, &tensors[rank]));
    }
    OK(peerlane_connect(gpus, WORLD, NULL, comms));
    OK(peerlane_register_all(comms, WORLD, tensors, BYTES, registrations));
    values();
    errors();
    values();
    OK(peerlane_deregister_all(comms, WORLD, registrations));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "deregistered", "", reduce(0, 0, 1));
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        peerlane_registration_free(registrations[rank]);
        OK(peerlane_gpu_free(gpus[rank], tensors[rank]));
        peerlane_comm_destroy(comms[rank]);
        peerlane_gpu_close(gpus[rank]);
    }
    peerlane_registration_free(NULL);
    puts("all is right");
    return 0;
}
