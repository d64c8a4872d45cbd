/* Calls beside the caller's stream, on simulated GPUs: values, waiting, freeing, errors.
 *
 * host/tests/c_interface.rs compiles this against host/include/peerlane.h, links it with
 * libpeerlane.so and runs it. Exit status 0: all is right; else the first thing that is not was
 * printed. */

#include "check.h"

enum { WORLD = 3, COUNT = 600, BYTES = COUNT * 4 };

static peerlane_gpu *gpus[WORLD];
static peerlane_comm *comms[WORLD];
static void *streams[WORLD];
static char *tensors[WORLD];

static void open_group(uint64_t deadline_ms) {
    peerlane_config config;
    OK(peerlane_config_init(&config, sizeof config));
    config.deadline_ms = deadline_ms;
    config.mailbox_bytes = (size_t)4 << 20;
    config.max_blocks = 2;
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        char name[32];
        snprintf(name, sizeof name, "sim:%u/%u", (unsigned)rank, (unsigned)WORLD);
        OK(peerlane_gpu_open(name, &gpus[rank]));
    }
    OK(peerlane_connect(gpus, WORLD, &config, comms));
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        void *tensor;
        OK(peerlane_gpu_alloc(gpus[rank], BYTES, &tensor));
        tensors[rank] = tensor;
        OK(peerlane_stream_create(gpus[rank], &streams[rank]));
    }
}

static void close_group(void) {
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        peerlane_comm_destroy(comms[rank]);
        OK(peerlane_gpu_free(gpus[rank], tensors[rank]));
        OK(peerlane_stream_destroy(gpus[rank], streams[rank]));
        peerlane_gpu_close(gpus[rank]);
    }
}

static float value(uint32_t rank, size_t i) { return (float)((i * 7 + rank * 3) % 32) - 16.0f; }

static float sum(size_t i) {
    float total = 0.0f;
    for (uint32_t rank = 0; rank < WORLD; rank++) total += value(rank, i);
    return total;
}

static void upload(uint32_t rank) {
    float data[COUNT];
    for (size_t i = 0; i < COUNT; i++) data[i] = value(rank, i);
    OK(peerlane_gpu_upload(gpus[rank], tensors[rank], data, sizeof data, streams[rank]));
}

static void download(uint32_t rank, void *data) {
    OK(peerlane_gpu_download(gpus[rank], data, tensors[rank], BYTES, streams[rank]));
}

static peerlane_work *begin(uint32_t rank) {
    peerlane_work *work = NULL;
    OK(peerlane_all_reduce_async(comms[rank], tensors[rank], tensors[rank], COUNT, PEERLANE_F32,
                                 PEERLANE_SUM, NULL, streams[rank], &work));
    TRUE(work != NULL);
    return work;
}

static void holds_the_sum(uint32_t rank) {
    float data[COUNT];
    download(rank, data);
    for (size_t i = 0; i < COUNT; i++) TRUE(data[i] == sum(i));
}

/* A work is not done before its peers have come; then it is, and says so twice. */
static void waits_on_the_host(void) {
    peerlane_work *works[WORLD];
    bool done = true;
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        upload(rank);
        works[rank] = begin(rank);
        if (rank == 0) {
            OK(peerlane_stream_synchronize(gpus[0], streams[0]));
            OK(peerlane_work_query(works[0], &done));
            TRUE(!done);
        }
    }
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        OK(peerlane_work_wait(works[rank]));
        OK(peerlane_work_wait(works[rank]));
        OK(peerlane_work_query(works[rank], &done));
        TRUE(done);
        holds_the_sum(rank);
        peerlane_work_free(works[rank]);
    }
}

static void waits_on_a_stream(void) {
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        upload(rank);
        peerlane_work *work = begin(rank);
        OK(peerlane_work_wait_on(work, streams[rank]));
        /* Rank 0 has no peer yet: the call goes on without its handle. */
        peerlane_work_free(work);
    }
    for (uint32_t rank = 0; rank < WORLD; rank++) holds_the_sum(rank);
}

/* Two chunks with a hole between them, the second one's event recorded on another stream. */
static void reduces_chunks(void) {
    enum { FIRST = 200, SECOND = 350 };
    void *events[WORLD][2], *others[WORLD];
    peerlane_work *works[WORLD][2];
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        upload(rank);
        OK(peerlane_stream_create(gpus[rank], &others[rank]));
        void *from[2] = {streams[rank], others[rank]};
        OK(peerlane_stream_synchronize(gpus[rank], streams[rank]));
        for (int i = 0; i < 2; i++) {
            OK(peerlane_event_create(gpus[rank], &events[rank][i]));
            OK(peerlane_event_record(gpus[rank], events[rank][i], from[i]));
        }
        const peerlane_chunk chunks[2] = {{0, FIRST, events[rank][0]},
                                          {SECOND, COUNT - SECOND, events[rank][1]}};
        OK(peerlane_all_reduce_chunks(comms[rank], tensors[rank], tensors[rank], COUNT, PEERLANE_F32,
                                      PEERLANE_SUM, NULL, chunks, 2, works[rank]));
    }
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        OK(peerlane_work_wait(works[rank][1]));
        float data[COUNT];
        download(rank, data);
        for (size_t i = 0; i < COUNT; i++)
            TRUE(data[i] == (i < FIRST || i >= SECOND ? sum(i) : value(rank, i)));
        for (int i = 0; i < 2; i++) {
            peerlane_work_free(works[rank][i]);
            OK(peerlane_event_destroy(gpus[rank], events[rank][i]));
        }
        OK(peerlane_stream_destroy(gpus[rank], others[rank]));
    }
}

/* Maxima scattered and gathered, then the root's tensor, then rows joined: each beside. */
static void every_collective_runs_beside(void) {
    enum { PART = COUNT / WORLD };
    const size_t widths[WORLD] = {1, 2, 3};
    peerlane_work *works[WORLD][4];
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        float data[COUNT];
        for (size_t i = 0; i < COUNT; i++) data[i] = (float)(i + rank);
        OK(peerlane_gpu_upload(gpus[rank], tensors[rank], data, BYTES, streams[rank]));
    }
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        char *tensor = tensors[rank], *own = tensor + rank * PART * 4;
        peerlane_comm *comm = comms[rank];
        void *stream = streams[rank];
        OK(peerlane_reduce_scatter_async(comm, tensor, own, PART, PEERLANE_F32, PEERLANE_MAX, NULL,
                                         stream, &works[rank][0]));
        OK(peerlane_all_gather_async(comm, own, tensor, PART * 4, stream, &works[rank][1]));
        OK(peerlane_broadcast_async(comm, tensor, 8, 2, NULL, stream, &works[rank][2]));
        OK(peerlane_gather_async(comm, tensor, rank == 1 ? tensor + 64 : NULL, 1, widths, WORLD, 1,
                                 stream, &works[rank][3]));
    }
    for (uint32_t rank = 0; rank < WORLD; rank++) {
        OK(peerlane_work_wait(works[rank][3]));
        float data[COUNT];
        download(rank, data);
        for (size_t i = 24; i < COUNT; i++) TRUE(data[i] == (float)(i + WORLD - 1));
        if (rank == 1) {
            /* Every rank's tensor begins with the same bytes. */
            const char *begin = (const char *)data, *joined = begin + 64;
            TRUE(joined[0] == begin[0] && memcmp(joined + 1, begin, 2) == 0);
            TRUE(memcmp(joined + 3, begin, 3) == 0);
        }
        for (int i = 0; i < 4; i++) peerlane_work_free(works[rank][i]);
    }
}

static void refuses_null(void) {
    peerlane_comm *comm = comms[0];
    void *t = tensors[0];
    peerlane_work *work = (peerlane_work *)t, *works[1];
    bool done;
    const peerlane_status bad = PEERLANE_INVALID_ARGUMENT;
    REFUSED(bad, "all_reduce_async: comm: expected a pointer to peerlane_comm", "NULL",
            peerlane_all_reduce_async(NULL, t, t, 1, PEERLANE_F32, PEERLANE_SUM, NULL, NULL, &work));
    TRUE(work == NULL);
    REFUSED(bad, "all_reduce_async: work: expected a pointer to a handle", "NULL",
            peerlane_all_reduce_async(comm, t, t, 1, PEERLANE_F32, PEERLANE_SUM, NULL, NULL, NULL));
    REFUSED(bad, "all_reduce_async: dtype", "got 99",
            peerlane_all_reduce_async(comm, t, t, 1, (peerlane_dtype)99, PEERLANE_SUM, NULL, NULL,
                                      &work));
    REFUSED(bad, "dst", "null",
            peerlane_all_reduce_async(comm, t, NULL, 1, PEERLANE_F32, PEERLANE_SUM, NULL, NULL,
                                      &work));
    REFUSED(bad, "broadcast", "got 99", peerlane_broadcast_async(comm, t, 1, 99, NULL, NULL, &work));
    REFUSED(bad, "gather_async: widths", "NULL",
            peerlane_gather_async(comm, t, t, 1, NULL, WORLD, 0, NULL, &work));
    REFUSED(bad, "work_query: work: expected a pointer to peerlane_work", "NULL",
            peerlane_work_query(NULL, &done));
    REFUSED(bad, "work_wait_on: work", "NULL", peerlane_work_wait_on(NULL, NULL));
    REFUSED(bad, "work_wait: work", "NULL", peerlane_work_wait(NULL));
    peerlane_work_free(NULL);

    const peerlane_chunk none = {0, 1, NULL}, outside = {COUNT, 1, t};
    REFUSED(bad, "all_reduce_chunks: chunks.ready: expected an event", "NULL in chunk 0",
            peerlane_all_reduce_chunks(comm, t, t, COUNT, PEERLANE_F32, PEERLANE_SUM, NULL, &none, 1,
                                       works));
    TRUE(works[0] == NULL);
    REFUSED(bad, "all_reduce_chunks: chunks: expected parts of a tensor of 600", "from 600 on",
            peerlane_all_reduce_chunks(comm, t, t, COUNT, PEERLANE_F32, PEERLANE_SUM, NULL, &outside,
                                       1, works));
    REFUSED(bad, "all_reduce_chunks: chunks", "NULL",
            peerlane_all_reduce_chunks(comm, t, t, COUNT, PEERLANE_F32, PEERLANE_SUM, NULL, NULL, 1,
                                       works));
    REFUSED(bad, "all_reduce_chunks: works", "NULL",
            peerlane_all_reduce_chunks(comm, t, t, COUNT, PEERLANE_F32, PEERLANE_SUM, NULL, &none, 1,
                                       NULL));
    OK(peerlane_all_reduce_chunks(comm, t, t, COUNT, PEERLANE_F32, PEERLANE_SUM, NULL, NULL, 0, NULL));
    REFUSED(bad, "event_create: gpu", "NULL", peerlane_event_create(NULL, &t));
    REFUSED(bad, "event_record: event", "NULL", peerlane_event_record(gpus[0], NULL, NULL));
    OK(peerlane_event_destroy(gpus[0], NULL));
}

/* Ranks that never come: the wait says so, every time, and after the communicator is gone. */
static void ends_badly(void) {
    peerlane_work *work = begin(0);
    REFUSED(PEERLANE_TIMEOUT, "rank 0", "rank 1", peerlane_work_wait(work));
    REFUSED(PEERLANE_TIMEOUT, "rank 0", "rank 1", peerlane_work_wait(work));
    bool done = false;
    OK(peerlane_work_query(work, &done));
    TRUE(done);
    peerlane_comm_destroy(comms[0]);
    comms[0] = NULL;
    REFUSED(PEERLANE_TIMEOUT, "rank 0", "rank 1", peerlane_work_wait(work));
    peerlane_work_free(work);
}

int main(void) {
    open_group(10000);
    waits_on_the_host();
    waits_on_a_stream();
    reduces_chunks();
    every_collective_runs_beside();
    refuses_null();
    waits_on_the_host();
    close_group();
    open_group(50);
    ends_badly();
    close_group();
    puts("all is right");
    return 0;
}
