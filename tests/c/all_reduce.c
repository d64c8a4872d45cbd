/* The C interface on simulated GPUs: values, errors, and the end of a group.
 *
 * host/tests/c_interface.rs compiles this against host/include/peerlane.h, links it with
 * libpeerlane.so and runs it. Exit status 0: all is right; else the first thing that is not was
 * printed. */

#include "check.h"

enum { MOST = 4, COUNT = 1000 };

typedef struct group {
    uint32_t world;
    peerlane_gpu *gpus[MOST];
    peerlane_comm *comms[MOST];
    void *streams[MOST];
    char *tensors[MOST];
} group;

static group open_group(uint32_t world, uint64_t deadline_ms) {
    group g = {.world = world};
    peerlane_config config;
    OK(peerlane_config_init(&config, sizeof config));
    config.deadline_ms = deadline_ms;
    config.mailbox_bytes = (size_t)4 << 20;
    config.max_blocks = 2;
    config.staging_bytes = (size_t)1 << 20;
    for (uint32_t rank = 0; rank < world; rank++) {
        char name[32];
        snprintf(name, sizeof name, "sim:%u/%u", (unsigned)rank, (unsigned)world);
        OK(peerlane_gpu_open(name, &g.gpus[rank]));
    }
    OK(peerlane_connect(g.gpus, world, &config, g.comms));
    for (uint32_t rank = 0; rank < world; rank++) {
        void *tensor;
        OK(peerlane_gpu_alloc(g.gpus[rank], COUNT * sizeof(float), &tensor));
        g.tensors[rank] = tensor;
        /* Rank 0 uses the default stream. */
        if (rank > 0) OK(peerlane_stream_create(g.gpus[rank], &g.streams[rank]));
    }
    return g;
}

static void upload(const group *g, uint32_t rank, const void *data, size_t bytes) {
    OK(peerlane_gpu_upload(g->gpus[rank], g->tensors[rank], data, bytes, g->streams[rank]));
}

static void download(const group *g, uint32_t rank, void *data, size_t bytes) {
    OK(peerlane_comm_synchronize(g->comms[rank], g->streams[rank]));
    OK(peerlane_gpu_download(g->gpus[rank], data, g->tensors[rank], bytes, g->streams[rank]));
}

static void close_group(group *g) {
    for (uint32_t rank = 0; rank < g->world; rank++) {
        OK(peerlane_comm_close(g->comms[rank]));
        OK(peerlane_comm_close(g->comms[rank]));
        REFUSED(PEERLANE_CLOSED, "barrier", "closed",
                peerlane_barrier(g->comms[rank], g->streams[rank]));
        peerlane_comm_destroy(g->comms[rank]);
        OK(peerlane_gpu_free(g->gpus[rank], g->tensors[rank]));
        OK(peerlane_stream_destroy(g->gpus[rank], g->streams[rank]));
        peerlane_gpu_close(g->gpus[rank]);
    }
}

/* Small whole numbers, exact in bfloat16 too, as are their sums. */
static float value(uint32_t rank, size_t i) { return (float)((i * 7 + rank * 3) % 32) - 16.0f; }

static float sum(uint32_t world, size_t i) {
    float total = 0.0f;
    for (uint32_t rank = 0; rank < world; rank++) total += value(rank, i);
    return total;
}

static uint16_t to_bf16(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static peerlane_status sum_in_place(const group *g, uint32_t rank, size_t count,
                                    peerlane_dtype dtype) {
    return peerlane_all_reduce(g->comms[rank], g->tensors[rank], g->tensors[rank], count, dtype,
                               PEERLANE_SUM, NULL, g->streams[rank]);
}

static void reduces_f32(const group *g) {
    float data[COUNT];
    for (uint32_t rank = 0; rank < g->world; rank++) {
        for (size_t i = 0; i < COUNT; i++) data[i] = value(rank, i);
        upload(g, rank, data, sizeof data);
        OK(sum_in_place(g, rank, COUNT, PEERLANE_F32));
    }
    for (uint32_t rank = 0; rank < g->world; rank++) {
        download(g, rank, data, sizeof data);
        for (size_t i = 0; i < COUNT; i++) TRUE(data[i] == sum(g->world, i));
    }
}

static void reduces_bf16(const group *g) {
    uint16_t data[COUNT];
    for (uint32_t rank = 0; rank < g->world; rank++) {
        for (size_t i = 0; i < COUNT; i++) data[i] = to_bf16(value(rank, i));
        upload(g, rank, data, sizeof data);
        OK(sum_in_place(g, rank, COUNT, PEERLANE_BF16));
    }
    for (uint32_t rank = 0; rank < g->world; rank++) {
        download(g, rank, data, sizeof data);
        for (size_t i = 0; i < COUNT; i++) TRUE(data[i] == to_bf16(sum(g->world, i)));
    }
}

/* Every option at once: the last rank adds nothing, values travel as bfloat16, in two steps. */
static void reduces_with_options(const group *g) {
    peerlane_reduce_options options;
    OK(peerlane_reduce_options_init(&options, sizeof options));
    options.wire = PEERLANE_WIRE_BF16;
    options.algorithm = PEERLANE_ALGORITHM_TWO_SHOT;
    float data[COUNT];
    for (uint32_t rank = 0; rank < g->world; rank++) {
        for (size_t i = 0; i < COUNT; i++) data[i] = value(rank, i);
        upload(g, rank, data, sizeof data);
        options.no_contribution = rank + 1 == g->world;
        OK(peerlane_all_reduce(g->comms[rank], g->tensors[rank], g->tensors[rank], COUNT,
                               PEERLANE_F32, PEERLANE_SUM, &options, g->streams[rank]));
    }
    for (uint32_t rank = 0; rank < g->world; rank++) {
        download(g, rank, data, sizeof data);
        for (size_t i = 0; i < COUNT; i++) TRUE(data[i] == sum(g->world - 1, i));
    }
}

/* A reduce-scatter of maxima into each rank's own part, and an all-gather of the parts. */
static void scatters_and_gathers_all(const group *g) {
    const size_t part = COUNT / MOST;
    float data[COUNT];
    for (uint32_t rank = 0; rank < g->world; rank++) {
        for (size_t i = 0; i < COUNT; i++) data[i] = (float)(i + rank);
        upload(g, rank, data, sizeof data);
        char *own = g->tensors[rank] + rank * part * sizeof(float);
        OK(peerlane_reduce_scatter(g->comms[rank], g->tensors[rank], own, part, PEERLANE_F32,
                                   PEERLANE_MAX, NULL, g->streams[rank]));
    }
    for (uint32_t rank = 0; rank < g->world; rank++) {
        char *own = g->tensors[rank] + rank * part * sizeof(float);
        OK(peerlane_all_gather(g->comms[rank], own, g->tensors[rank], part * sizeof(float),
                               g->streams[rank]));
    }
    for (uint32_t rank = 0; rank < g->world; rank++) {
        download(g, rank, data, sizeof data);
        for (size_t i = 0; i < part * g->world; i++) TRUE(data[i] == (float)(i + g->world - 1));
    }
}

/* Through a hub, as copies by the copy engines. NULL for options: a route by size. */
static void broadcasts(const group *g, bool copies) {
    const uint32_t root = g->world - 1;
    char data[77];
    peerlane_broadcast_options options;
    OK(peerlane_broadcast_options_init(&options, sizeof options));
    options.route = PEERLANE_ROUTE_COPY_HUB;
    for (uint32_t rank = 0; rank < g->world; rank++) {
        memset(data, 'a' + (int)rank, sizeof data);
        upload(g, rank, data, sizeof data);
        OK(peerlane_broadcast(g->comms[rank], g->tensors[rank], sizeof data, root,
                              copies ? &options : NULL, g->streams[rank]));
    }
    for (uint32_t rank = 0; rank < g->world; rank++) {
        download(g, rank, data, sizeof data);
        for (size_t i = 0; i < sizeof data; i++) TRUE(data[i] == 'a' + (int)root);
    }
}

/* Rank r brings 3 rows of r + 1 bytes; rank 0 has them joined behind its own. */
static void gathers(const group *g) {
    enum { ROWS = 3 };
    size_t widths[MOST], total = 0;
    for (uint32_t rank = 0; rank < g->world; rank++) total += widths[rank] = rank + 1;
    char data[128];
    for (uint32_t rank = 0; rank < g->world; rank++) {
        memset(data, 'a' + (int)rank, sizeof data);
        upload(g, rank, data, sizeof data);
        void *joined = rank == 0 ? g->tensors[0] + 64 : NULL;
        OK(peerlane_gather(g->comms[rank], g->tensors[rank], joined, ROWS, widths, g->world, 0,
                           g->streams[rank]));
        OK(peerlane_barrier(g->comms[rank], g->streams[rank]));
    }
    download(g, 0, data, sizeof data);
    const char *at = data + 64;
    for (size_t row = 0; row < ROWS; row++)
        for (uint32_t rank = 0; rank < g->world; rank++)
            for (size_t i = 0; i < widths[rank]; i++) TRUE(*at++ == 'a' + (int)rank);
    TRUE(at == data + 64 + ROWS * total && *at == 'a');
    for (uint32_t rank = 1; rank < g->world; rank++)
        OK(peerlane_comm_synchronize(g->comms[rank], g->streams[rank]));
}

static void knows_who_it_is(const group *g) {
    for (uint32_t rank = 0; rank < g->world; rank++) {
        uint32_t found = 99, world = 99;
        OK(peerlane_comm_rank(g->comms[rank], &found));
        OK(peerlane_comm_world_size(g->comms[rank], &world));
        TRUE(found == rank && world == g->world);
        OK(peerlane_comm_health(g->comms[rank]));
        OK(peerlane_comm_set_deadline(g->comms[rank], 60000));
    }
}

static void refuses_null(const group *g) {
    peerlane_gpu *gpu = g->gpus[0], *gpus[2] = {g->gpus[0], NULL};
    peerlane_comm *comm = g->comms[0], *comms[2] = {NULL, NULL};
    void *memory = g->tensors[0];
    const peerlane_status bad = PEERLANE_INVALID_ARGUMENT;
    REFUSED(bad, "gpu_open: name: expected a pointer to text", "NULL", peerlane_gpu_open(NULL, &gpu));
    TRUE(gpu == NULL);
    gpu = g->gpus[0];
    REFUSED(bad, "gpu_open: gpu:", "NULL", peerlane_gpu_open("sim:0/1", NULL));
    REFUSED(bad, "gpu_alloc: gpu: expected a pointer to peerlane_gpu", "NULL",
            peerlane_gpu_alloc(NULL, 1, &memory));
    memory = g->tensors[0];
    REFUSED(bad, "gpu_upload: src:", "NULL", peerlane_gpu_upload(gpu, memory, NULL, 4, NULL));
    REFUSED(bad, "gpu_upload: dst:", "NULL", peerlane_gpu_upload(gpu, NULL, "abc", 4, NULL));
    REFUSED(bad, "gpu_download: dst:", "NULL", peerlane_gpu_download(gpu, NULL, memory, 4, NULL));
    REFUSED(bad, "connect: gpus:", "NULL", peerlane_connect(NULL, 2, NULL, comms));
    REFUSED(bad, "connect: gpus:", "NULL", peerlane_connect(gpus, 2, NULL, comms));
    REFUSED(bad, "connect: comms:", "NULL", peerlane_connect(gpus, 1, NULL, NULL));
    REFUSED(bad, "join_processes: name:", "NULL",
            peerlane_join_processes(NULL, 0, 1, 1, gpu, NULL, comms));
    REFUSED(bad, "all_reduce: comm: expected a pointer to peerlane_comm", "NULL",
            peerlane_all_reduce(NULL, memory, memory, 1, PEERLANE_F32, PEERLANE_SUM, NULL, NULL));
    REFUSED(bad, "all_reduce: dst", "null",
            peerlane_all_reduce(comm, memory, NULL, 1, PEERLANE_F32, PEERLANE_SUM, NULL, NULL));
    REFUSED(bad, "gather: widths", "NULL",
            peerlane_gather(comm, memory, memory, 1, NULL, g->world, 0, NULL));
    REFUSED(bad, "comm_rank: rank: expected a pointer to uint32_t", "NULL",
            peerlane_comm_rank(comm, NULL));
    REFUSED(bad, "config_init: config", "NULL", peerlane_config_init(NULL, sizeof(peerlane_config)));
    REFUSED(bad, "comm_close: comm", "NULL", peerlane_comm_close(NULL));
    peerlane_comm_destroy(NULL);
    peerlane_gpu_close(NULL);
    OK(peerlane_gpu_free(gpu, NULL));
    OK(peerlane_stream_destroy(gpu, NULL));
}

/* Mailboxes grow to what the largest call needs at once; a rank twice, or one that may not, is refused. */
static void adapts(const group *fixed) {
    group g = {.world = 2};
    peerlane_config config;
    OK(peerlane_config_init(&config, sizeof config));
    TRUE(config.adaptive == 0);
    config.adaptive = 1;
    config.max_blocks = 2;
    config.mailbox_bytes = config.least_mailbox_bytes = 64 << 10;
    for (uint32_t rank = 0; rank < 2; rank++) {
        OK(peerlane_gpu_open(rank == 0 ? "sim:0/2" : "sim:1/2", &g.gpus[rank]));
    }
    OK(peerlane_connect(g.gpus, 2, &config, g.comms));
    const size_t count = 3000;
    for (uint32_t rank = 0; rank < 2; rank++) {
        void *tensor;
        OK(peerlane_gpu_alloc(g.gpus[rank], count * sizeof(float), &tensor));
        g.tensors[rank] = tensor;
    }
    int changed = 7;
    peerlane_usage usage;
    for (uint64_t turn = 0; turn < 2; turn++) {
        for (uint32_t rank = 0; rank < 2; rank++) {
            OK(peerlane_all_reduce(g.comms[rank], g.tensors[rank], g.tensors[rank], count,
                                   PEERLANE_F32, PEERLANE_SUM, NULL, NULL));
        }
        OK(peerlane_adapt_all(g.comms, 2, &changed));
        TRUE(changed == (turn == 0));
        OK(peerlane_comm_usage(g.comms[1], &usage, sizeof usage));
        const peerlane_counts *counts = &usage.all_reduce;
        TRUE(counts->calls == turn + 1 && counts->largest == count * sizeof(float));
        TRUE(counts->several_turns == 1 && counts->largest_since == 0);
        TRUE(usage.adapts == turn + 1 && usage.resizes == 1);
        TRUE(usage.mailbox_bytes > config.mailbox_bytes);
    }
    const peerlane_status bad = PEERLANE_INVALID_ARGUMENT;
    peerlane_comm *twice[2] = {g.comms[0], g.comms[0]};
    REFUSED(bad, "adapt_all: comms", "one twice", peerlane_adapt_all(twice, 2, &changed));
    TRUE(changed == 0);
    REFUSED(bad, "adapt: ranks", "1 of 2 ranks", peerlane_adapt_all(g.comms, 1, &changed));
    REFUSED(bad, "adapt: sizing", "none", peerlane_comm_adapt(fixed->comms[0], &changed));
    REFUSED(bad, "comm_usage: size", "got 3", peerlane_comm_usage(g.comms[0], &usage, 3));
    for (uint32_t rank = 0; rank < 2; rank++) {
        OK(peerlane_comm_synchronize(g.comms[rank], NULL));
        peerlane_comm_destroy(g.comms[rank]);
        OK(peerlane_gpu_free(g.gpus[rank], g.tensors[rank]));
        peerlane_gpu_close(g.gpus[rank]);
    }
}

static void refuses_what_names_nothing(const group *g) {
    peerlane_gpu *gpu = NULL;
    peerlane_comm *comm = g->comms[0], *comms[2];
    void *tensor = g->tensors[0];
    const peerlane_status bad = PEERLANE_INVALID_ARGUMENT;
    REFUSED(bad, "dtype: expected one of PEERLANE_F32 (0), ", "got 99",
            peerlane_all_reduce(comm, tensor, tensor, 1, (peerlane_dtype)99, PEERLANE_SUM, NULL,
                                NULL));
    REFUSED(bad, "op: expected one of PEERLANE_SUM (0), ", "got 7",
            peerlane_all_reduce(comm, tensor, tensor, 1, PEERLANE_F32, (peerlane_op)7, NULL, NULL));
    peerlane_reduce_options options;
    OK(peerlane_reduce_options_init(&options, sizeof options));
    options.algorithm = PEERLANE_ALGORITHM_TWO_SHOT;
    REFUSED(bad, "reduce_scatter: options.algorithm", "PEERLANE_ALGORITHM_AUTO",
            peerlane_reduce_scatter(comm, tensor, tensor, 1, PEERLANE_F32, PEERLANE_SUM, &options,
                                    NULL));
    options.size = 4;
    REFUSED(bad, "options.size", "got 4",
            peerlane_all_reduce(comm, tensor, tensor, 1, PEERLANE_F32, PEERLANE_SUM, &options,
                                NULL));
    REFUSED(bad, "broadcast: root", "got 99", peerlane_broadcast(comm, tensor, 1, 99, NULL, NULL));
    REFUSED(bad, "name: expected cuda:K, or sim:K/N", "got \"sim:8/8\"",
            peerlane_gpu_open("sim:8/8", &gpu));
    REFUSED(bad, "name: expected UTF-8", "got", peerlane_gpu_open("sim:\xff", &gpu));
    REFUSED(bad, "connect: world_size: expected 1 to 16", "got 17",
            peerlane_connect(g->gpus, 17, NULL, comms));
    peerlane_broadcast_options route;
    OK(peerlane_broadcast_options_init(&route, sizeof route));
    route.route = (peerlane_route)11;
    REFUSED(bad, "broadcast: options.route", "got 11",
            peerlane_broadcast(comm, tensor, 1, 0, &route, NULL));
    route.size = 4;
    REFUSED(bad, "options.size", "got 4", peerlane_broadcast(comm, tensor, 1, 0, &route, NULL));
    OK(peerlane_gpu_open("sim:1/7", &gpu));
    peerlane_gpu *strangers[2] = {g->gpus[0], gpu};
    REFUSED(bad, "gpus: expected GPUs of one machine", "sim:1/7",
            peerlane_connect(strangers, 2, NULL, comms));
    TRUE(comms[0] == NULL && comms[1] == NULL);
    peerlane_gpu_close(gpu);
    TRUE(strcmp(peerlane_status_name((peerlane_status)99), "unknown status") == 0);
    TRUE(strcmp(peerlane_status_name(PEERLANE_MISMATCH), "PEERLANE_MISMATCH") == 0);
}

/* Rank 1 brings another size, is told both, and may correct itself. */
static void notices_a_mismatch(const group *g) {
    float data[16] = {0};
    for (uint32_t rank = 0; rank < g->world; rank++) upload(g, rank, data, sizeof data);
    OK(sum_in_place(g, 0, 16, PEERLANE_F32));
    REFUSED(PEERLANE_MISMATCH, "rank 1 brings all_reduce f32 sum of 60 bytes",
            "rank 0 brings all_reduce f32 sum of 64 bytes", sum_in_place(g, 1, 15, PEERLANE_F32));
    for (uint32_t rank = 1; rank < g->world; rank++) OK(sum_in_place(g, rank, 16, PEERLANE_F32));
    for (uint32_t rank = 0; rank < g->world; rank++) download(g, rank, data, sizeof data);
}

/* How a group ends badly: rank 1 never calls, or gives up for all. */
static void ends_badly(int abort) {
    group g = open_group(2, abort ? 60000 : 50);
    OK(sum_in_place(&g, 0, 16, PEERLANE_F32));
    if (abort) OK(peerlane_comm_abort(g.comms[1]));
    const peerlane_status wanted = abort ? PEERLANE_ABORTED : PEERLANE_TIMEOUT;
    REFUSED(wanted, "rank 0", "rank 1", peerlane_comm_synchronize(g.comms[0], g.streams[0]));
    REFUSED(wanted, "rank 0", "rank 1", sum_in_place(&g, 0, 16, PEERLANE_F32));
    REFUSED(wanted, "rank 0", "rank 1", peerlane_comm_health(g.comms[0]));
    REFUSED(wanted, "rank 0", "rank 1", peerlane_comm_close(g.comms[0]));
    close_group(&g);
}

int main(void) {
    TRUE(strcmp(peerlane_last_error(), "") == 0);
    TRUE(strlen(peerlane_version()) >= strlen("0.0.0"));
    for (uint32_t world = 2; world <= MOST; world++) {
        group g = open_group(world, 10000);
        knows_who_it_is(&g);
        reduces_f32(&g);
        reduces_bf16(&g);
        reduces_with_options(&g);
        scatters_and_gathers_all(&g);
        broadcasts(&g, false);
        broadcasts(&g, true);
        gathers(&g);
        refuses_null(&g);
        refuses_what_names_nothing(&g);
        adapts(&g);
        notices_a_mismatch(&g);
        close_group(&g);
    }
    ends_badly(0);
    ends_badly(1);
    puts("all is right");
    return 0;
}
