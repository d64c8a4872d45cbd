/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Peerlane: peer-to-peer collectives for the GPUs of one machine. How to link, and a program to
 * begin with: docs/c.md. This file is made from host/src/ffi/; change that, then run
 *     PEERLANE_UPDATE_HEADER=1 cargo test -p peerlane --test c_header
 *
 * ERRORS. A function that can fail returns a status. If it is not PEERLANE_OK, the thread that
 * called finds the reason in peerlane_last_error(). NULL is refused with an error that names the
 * argument, except where a function says otherwise. A collective that returns an error has queued
 * nothing and changed nothing. What goes wrong later, on the GPU, is seen by
 * peerlane_comm_synchronize, peerlane_comm_health and every later call.
 *
 * STREAMS are CUstream (cudaStream_t) values, passed as void *; NULL is the GPU's default stream.
 * Collectives are queued and return at once; calls of one communicator run in the order in which
 * they were made, on whichever streams. A stream must exist until the next call has been made.
 *
 * TENSORS are addresses in memory of the rank's GPU, whoever allocated it. They stay alive and
 * untouched by others until the stream has passed the call; those of a call that returns a
 * peerlane_work, until the work is done. Sizes are in elements where values are
 * reduced and in bytes where they are only moved. All ranks bring the same sizes, types, operators
 * and roots; if not, one of them gets PEERLANE_MISMATCH.
 *
 * THREADS. One communicator is used by one thread at a time; different ones freely. The exception
 * are peerlane_comm_abort, peerlane_comm_health, peerlane_comm_rank and peerlane_comm_world_size,
 * which any thread may call at any time before peerlane_comm_destroy begins. A peerlane_gpu and a
 * peerlane_work may be used by many threads at once. Destroying or closing a handle ends its use on every thread.
 * A process that has called this library may not fork and go on calling it in the child.
 */

#ifndef PEERLANE_H
#define PEERLANE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// All readers that are not forgotten, for `readers` of a message.
#define PEERLANE_CHANNEL_EVERYBODY 4294967295

// How a call ended.
typedef enum {
    // It did what it should.
    PEERLANE_OK = 0,
    // An argument is not what the call can work with. Nothing has changed.
    PEERLANE_INVALID_ARGUMENT = 1,
    // Two ranks called different things. Nothing has changed; the rank may call again.
    PEERLANE_MISMATCH = 2,
    // The machine cannot do it.
    PEERLANE_UNSUPPORTED = 3,
    // No NVIDIA driver could be loaded.
    PEERLANE_NO_DRIVER = 4,
    // A call of the CUDA driver failed.
    PEERLANE_DRIVER = 5,
    // Two GPUs cannot reach each other.
    PEERLANE_UNREACHABLE = 6,
    // A wait on the GPU reached its deadline.
    PEERLANE_TIMEOUT = 7,
    // The communicator was aborted, by this rank or by another.
    PEERLANE_ABORTED = 8,
    // The process of a rank has ended without closing its communicator.
    PEERLANE_PEER_LOST = 9,
    // What a GPU read is not what its peer wrote.
    PEERLANE_CORRUPT = 10,
    // The ranks did not meet.
    PEERLANE_RENDEZVOUS = 11,
    // The communicator is closed.
    PEERLANE_CLOSED = 12,
    // A simulated GPU found a kernel doing what hardware would not forgive.
    PEERLANE_SIMULATED = 13,
    // A bug in Peerlane.
    PEERLANE_INTERNAL = 14,
} peerlane_status;

// How an all-reduce is carried out.
typedef enum {
    // By size: what is expected to be fastest.
    PEERLANE_ALGORITHM_AUTO = 0,
    // Every rank sends its tensor to every other, 8 bytes and their flag at a time.
    PEERLANE_ALGORITHM_ONE_SHOT_PACKET = 1,
    // Every rank sends its tensor to every other, 16 bytes at a time.
    PEERLANE_ALGORITHM_ONE_SHOT_FULL = 2,
    // Reduce-scatter and all-gather in one kernel.
    PEERLANE_ALGORITHM_TWO_SHOT = 3,
    // The same, each rank sending to one other at a time.
    PEERLANE_ALGORITHM_STAGED = 4,
    // Round the ring; rounded at each step.
    PEERLANE_ALGORITHM_RING = 5,
    // Up and down one binomial tree; rounded at each inner rank.
    PEERLANE_ALGORITHM_TREE = 6,
    // Up and down two binary trees with half the tensor each; rounded at each inner rank.
    PEERLANE_ALGORITHM_DOUBLE_TREE = 7,
    // Inside islands, between them, inside them; rounded once per island.
    PEERLANE_ALGORITHM_HIERARCHICAL = 8,
    // The steps of TWO_SHOT as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_TWO_SHOT = 9,
    // The steps of RING as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_RING = 10,
    // The steps of TREE as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_TREE = 11,
    // The steps of DOUBLE_TREE as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_DOUBLE_TREE = 12,
    // The steps of HIERARCHICAL as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_HIERARCHICAL = 13,
    // The steps of ONE_SHOT_FULL as copies by the copy engines.
    PEERLANE_ALGORITHM_COPY_ONE_SHOT = 14,
} peerlane_algorithm;

// How a broadcast is carried out.
typedef enum {
    // By size: what is expected to be fastest.
    PEERLANE_ROUTE_AUTO = 0,
    // The root sends to every other rank.
    PEERLANE_ROUTE_DIRECT = 1,
    // The root sends to one rank, which sends to all others.
    PEERLANE_ROUTE_HUB = 2,
    // Rank by rank.
    PEERLANE_ROUTE_CHAIN = 3,
    // A binomial tree.
    PEERLANE_ROUTE_TREE = 4,
    // Two binary trees with half the tensor each.
    PEERLANE_ROUTE_DOUBLE_TREE = 5,
    // DIRECT as copies by the copy engines.
    PEERLANE_ROUTE_COPY_DIRECT = 6,
    // HUB as copies by the copy engines.
    PEERLANE_ROUTE_COPY_HUB = 7,
    // CHAIN as copies by the copy engines.
    PEERLANE_ROUTE_COPY_CHAIN = 8,
    // TREE as copies by the copy engines.
    PEERLANE_ROUTE_COPY_TREE = 9,
    // DOUBLE_TREE as copies by the copy engines.
    PEERLANE_ROUTE_COPY_DOUBLE_TREE = 10,
} peerlane_route;

// What carries data from rank to rank.
typedef enum {
    // For each ordered pair of ranks, peer-to-peer where that works, else host memory.
    PEERLANE_TRANSPORT_AUTO = 0,
    // The sender's GPU writes into the receiver's; a pair that cannot do that is an error.
    PEERLANE_TRANSPORT_P2P = 1,
    // The sender's GPU writes into pinned host memory, which the receiver's reads.
    PEERLANE_TRANSPORT_HOST = 2,
} peerlane_transport;

// How f32 elements travel between GPUs; other types always travel as they are.
typedef enum {
    // As they are.
    PEERLANE_WIRE_NATIVE = 0,
    // Rounded to bfloat16: half the traffic.
    PEERLANE_WIRE_BF16 = 1,
} peerlane_wire;

// The type of a tensor's elements, where values are reduced.
typedef enum {
    // IEEE binary32.
    PEERLANE_F32 = 0,
    // IEEE binary16.
    PEERLANE_F16 = 1,
    // bfloat16.
    PEERLANE_BF16 = 2,
} peerlane_dtype;

// How values are combined, in f32 and in rank order.
typedef enum {
    // Their sum.
    PEERLANE_SUM = 0,
    // The largest; a NaN loses against a number.
    PEERLANE_MAX = 1,
    // The smallest; a NaN loses against a number.
    PEERLANE_MIN = 2,
    // Their sum divided by the world size.
    PEERLANE_AVG = 3,
} peerlane_op;

// The end of a channel that receives.
typedef struct peerlane_channel_reader peerlane_channel_reader;

// The end of a channel that sends: one writer, up to 32 readers, a ring in shared memory.
typedef struct peerlane_channel_writer peerlane_channel_writer;

// One rank's end of a group of GPUs.
typedef struct peerlane_comm peerlane_comm;

// A GPU of this machine or of a simulated one.
typedef struct peerlane_gpu peerlane_gpu;

// A tensor of each rank that all ranks reach.
typedef struct peerlane_registration peerlane_registration;

// An asynchronous call. It may outlive its communicator.
typedef struct peerlane_work peerlane_work;

// What all ranks of a group agree on when they meet. `peerlane_config_init` fills it.
typedef struct {
    // sizeof(peerlane_config).
    size_t size;
    // A wait on the GPU that lasts longer than this many milliseconds ends with
    // PEERLANE_TIMEOUT.
    uint64_t deadline_ms;
    // Most bytes of device memory for one rank's mailbox.
    size_t mailbox_bytes;
    // Most blocks that one call may use; 0 for as many as the smallest GPU holds.
    uint32_t max_blocks;
    // How every all-reduce is carried out that does not choose for itself.
    peerlane_algorithm algorithm;
    // How every broadcast is carried out.
    peerlane_route route;
    // If not 0, one algorithm and one route for all sizes.
    int fixed;
    // If not 0, algorithms that round more than once may be chosen by size too.
    int inexact;
    // The table of measured choices: "auto" or NULL for the one in the user's cache, "off" for
    // none, or the name of a file.
    const char *tuning;
    // What carries data from rank to rank.
    peerlane_transport transport;
    // If not 0, `peerlane_comm_adapt` may change `mailbox_bytes`, which is then what the ranks begin with.
    int adaptive;
    // Mailboxes do not shrink below this.
    size_t least_mailbox_bytes;
    // Mailboxes do not grow above this.
    size_t most_mailbox_bytes;
    // Bytes of device memory for one rank's staging area, which algorithms and routes named COPY need.
    // 0: some 64 MiB if `algorithm` or `route` is one of those, none otherwise.
    size_t staging_bytes;
    // The deadline of waits in a rank's first call, if that is longer; 0 for six times `deadline_ms`.
    uint64_t first_deadline_ms;
    // If not 0, the ranks compare on the GPU what they call, and checksums of all that travels.
    int checked;
} peerlane_config;

// What a reduction may be asked for beside its arguments. `peerlane_reduce_options_init` fills it.
typedef struct {
    // sizeof(peerlane_reduce_options).
    size_t size;
    // How f32 elements travel.
    peerlane_wire wire;
    // How the reduction is carried out; a reduce-scatter has PEERLANE_ALGORITHM_AUTO only.
    peerlane_algorithm algorithm;
    // If not 0, this rank adds nothing: its `src` is not read, and it still receives the result.
    // The only field in which ranks may differ.
    int no_contribution;
} peerlane_reduce_options;

// What a broadcast may be asked for beside its arguments. `peerlane_broadcast_options_init` fills it.
typedef struct {
    // sizeof(peerlane_broadcast_options).
    size_t size;
    // How the broadcast is carried out.
    peerlane_route route;
} peerlane_broadcast_options;

// What the calls of one family have brought. A call's bytes are those of its tensor: of the whole one for
// all-reduces and broadcasts, of one rank's part for reduce-scatters and all-gathers, of the largest
// rank's rows for gathers.
typedef struct {
    // Calls that were queued.
    uint64_t calls;
    // Bytes of all of them.
    uint64_t bytes;
    // Bytes of the largest call ever.
    uint64_t largest;
    // Bytes of the largest call since `peerlane_comm_adapt`.
    uint64_t largest_since;
    // Calls that did not fit the mailbox or the staging area at once.
    uint64_t several_turns;
} peerlane_counts;

// What a rank's calls have brought.
typedef struct {
    // sizeof(peerlane_usage).
    size_t size;
    // All-reduces that are one kernel each.
    peerlane_counts all_reduce;
    // All-reduces by the copy engines, through the staging area.
    peerlane_counts scheduled;
    // Reduce-scatters.
    peerlane_counts reduce_scatter;
    // All-gathers.
    peerlane_counts all_gather;
    // Broadcasts.
    peerlane_counts broadcast;
    // Gathers.
    peerlane_counts gather;
    // Barriers.
    peerlane_counts barrier;
    // Calls captured in CUDA graphs; counted only if `peerlane_config.adaptive` was set.
    uint64_t captured;
    // How often the ranks have looked at their sizes together.
    uint64_t adapts;
    // How often sizes have changed.
    uint64_t resizes;
    // Most bytes of device memory for this rank's mailbox.
    size_t mailbox_bytes;
    // Bytes of this rank's staging area.
    size_t staging_bytes;
} peerlane_usage;

// A part of a tensor that becomes ready by itself.
typedef struct {
    // Its first element.
    size_t first_element;
    // Its elements: some rows, usually.
    size_t count;
    // A CUevent (cudaEvent_t), or one of `peerlane_event_create`, recorded where the producer has
    // finished it. Not NULL.
    void *ready;
} peerlane_chunk;

// What stands before a payload.
typedef struct {
    // Bytes of the payload.
    uint64_t bytes;
    // Its number among all messages of the channel, counted from 1.
    uint64_t sequence;
    // Whom it is for, a bit each.
    uint32_t readers;
    // What the writer calls it.
    uint16_t kind;
    // More of that.
    uint16_t flags;
} peerlane_channel_message;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The library's version, for example "0.1.0".
const char *peerlane_version(void);

// The name of a status, for example "PEERLANE_TIMEOUT". Never NULL, whatever the number.
const char *peerlane_status_name(peerlane_status status);

// What the last call that failed on this thread had to say; empty if none has. Never NULL. Calls
// that succeed leave it; the text is valid until the next call on this thread that fails.
const char *peerlane_last_error(void);

// Fills a configuration with defaults: a deadline of 10 seconds, mailboxes of 32 MiB, as many
// blocks as fit, and algorithms by size and the transport that suits each pair unless the
// environment says otherwise (PEERLANE_ALGORITHM, PEERLANE_ROUTE, PEERLANE_FIXED, PEERLANE_EXACT,
// PEERLANE_TRANSPORT: auto, p2p or host; PEERLANE_CHECKED; PEERLANE_SELF_TEST: auto, off or always, which is
// read again in any case; PEERLANE_TUNING, which is read again where `tuning` stays
// NULL). `size` is sizeof(peerlane_config).
peerlane_status peerlane_config_init(peerlane_config *config,
                                     size_t size);

// Fills options with defaults: the native wire, an algorithm by size, a rank that contributes.
// `size` is sizeof(peerlane_reduce_options).
peerlane_status peerlane_reduce_options_init(peerlane_reduce_options *options, size_t size);

// Fills options with defaults: a route by size. `size` is sizeof(peerlane_broadcast_options).
peerlane_status peerlane_broadcast_options_init(peerlane_broadcast_options *options, size_t size);

// Opens a GPU: "cuda:K" is the K-th that the CUDA driver shows; "sim:K/N" is the K-th of a
// simulated machine of N, with K from 0 and N from 1 to 16. Within a process, all "sim:K/N" of one
// N belong to one machine for as long as one of them is open or used by a communicator.
peerlane_status peerlane_gpu_open(const char *name, peerlane_gpu **gpu);

// Gives a GPU back. Communicators that use it keep what they need of it. Fine with NULL.
void peerlane_gpu_close(peerlane_gpu *gpu);

// Allocates device memory, aligned to 256 bytes or better, with undefined content. Tensors may
// just as well be memory of the CUDA runtime or of a framework.
peerlane_status peerlane_gpu_alloc(const peerlane_gpu *gpu, size_t bytes, void **memory);

// Frees what `peerlane_gpu_alloc` returned, once no queued work uses it any more. Fine with NULL.
peerlane_status peerlane_gpu_free(const peerlane_gpu *gpu, void *memory);

// Queues a copy of `bytes` bytes from the host to the GPU. `src` may be reused when the call
// returns.
peerlane_status peerlane_gpu_upload(const peerlane_gpu *gpu,
                                    void *dst,
                                    const void *src,
                                    size_t bytes,
                                    void *stream);

// Copies `bytes` bytes from the GPU to the host after everything queued on `stream`, and waits for
// that.
peerlane_status peerlane_gpu_download(const peerlane_gpu *gpu,
                                      void *dst,
                                      const void *src,
                                      size_t bytes,
                                      void *stream);

// Makes a stream that does not wait for the default stream. Streams of the CUDA runtime or of a
// framework do just as well.
peerlane_status peerlane_stream_create(const peerlane_gpu *gpu, void **stream);

// Destroys a stream of `peerlane_stream_create`; work queued on it still completes. Fine with
// NULL.
peerlane_status peerlane_stream_destroy(const peerlane_gpu *gpu, void *stream);

// Waits until everything queued on a stream is done. `peerlane_comm_synchronize` also says whether
// the communicator's calls went well.
peerlane_status peerlane_stream_synchronize(const peerlane_gpu *gpu, void *stream);

// Makes all ranks of a group at once, rank r on `gpus[r]`, for a process that has them all.
// Several ranks may share a GPU. `config` may be NULL. `comms` has room for `world_size` handles;
// they may go to threads of their own. On failure all of them are NULL, unless it is `world_size`
// that is refused.
peerlane_status peerlane_connect(peerlane_gpu *const *gpus,
                                 uint32_t world_size,
                                 const peerlane_config *config,
                                 peerlane_comm **comms);

// Joins a group as `rank`, each rank a process of its own; returns once all ranks have joined.
// Every process gives the same `name`, up to 90 bytes that no other group of this machine uses at
// the same time, the same `world_size`, and its own `gpu`. `patience_ms` is how long it waits for
// the others. `config` may be NULL. On failure *comm is NULL.
peerlane_status peerlane_join_processes(const char *name,
                                        uint32_t rank,
                                        uint32_t world_size,
                                        uint64_t patience_ms,
                                        const peerlane_gpu *gpu,
                                        const peerlane_config *config,
                                        peerlane_comm **comm);

// Which rank it is.
peerlane_status peerlane_comm_rank(const peerlane_comm *comm, uint32_t *rank);

// How many ranks its group has.
peerlane_status peerlane_comm_world_size(const peerlane_comm *comm, uint32_t *world_size);

// What carries data from rank `from` to rank `to`: PEERLANE_TRANSPORT_P2P or PEERLANE_TRANSPORT_HOST.
peerlane_status peerlane_comm_transport(const peerlane_comm *comm,
                                        uint32_t from,
                                        uint32_t to,
                                        peerlane_transport *transport);

// The first error that a call of this rank met on the GPU. It stays, and every later call returns it too: all ranks
// may recover (`peerlane_recover`), go on without the rank that is gone (`peerlane_shrink`), or close. Does not
// wait.
peerlane_status peerlane_comm_health(const peerlane_comm *comm);

// How long this rank's waits may last from its next call on. Ranks may differ.
peerlane_status peerlane_comm_set_deadline(peerlane_comm *comm, uint64_t deadline_ms);

// Waits until everything queued on `stream` is done, and says whether this rank's calls went well.
peerlane_status peerlane_comm_synchronize(const peerlane_comm *comm, void *stream);

// Ends every wait of every rank of the group; their calls return PEERLANE_ABORTED from then on,
// until they recover.
// Any thread may call it at any time before `peerlane_comm_destroy` begins.
peerlane_status peerlane_comm_abort(const peerlane_comm *comm);

// Ends the communicator: waits for everything queued on its GPU, says whether its calls went well,
// and lets go of the group, whose memory is freed when all ranks have. A second call does nothing.
peerlane_status peerlane_comm_close(peerlane_comm *comm);

// Closes the communicator if it is open, and frees the handle. Fine with NULL.
void peerlane_comm_destroy(peerlane_comm *comm);

// Brings the communicator back after an abort, a time-out or any other error of its calls; of a healthy one it is a
// reset. All ranks call it, each from its thread or process, and no other call is made meanwhile, nor a graph
// launched with one. Waits for the others for as long as the deadline, and for everything on this rank's GPU.
// Tensors, registrations and CUDA graphs stay valid. On failure the communicator stays aborted on all ranks, and may
// try again; PEERLANE_PEER_LOST says that a rank's process has ended, without which only `peerlane_shrink` goes on.
peerlane_status peerlane_recover(peerlane_comm *comm);

// `peerlane_recover` for one thread that has all ranks of a group, in rank order.
peerlane_status peerlane_recover_all(peerlane_comm *const *comms, uint32_t world_size);

// Goes on without `count` ranks, which are gone or hang. All others call it with the same ranks and become a smaller
// group, numbered anew in the order they had. Waits as `peerlane_recover` does. The memory is new: CUDA graphs
// with earlier calls must not be launched any more, and tensors are registered again. On failure the
// communicator stays aborted on all ranks, and may try again.
peerlane_status peerlane_shrink(peerlane_comm *comm,
                                const uint32_t *without,
                                size_t count);

// `peerlane_shrink` for one thread that has all ranks that are left, `world_size` of them, in rank order.
peerlane_status peerlane_shrink_all(peerlane_comm *const *comms,
                                    uint32_t world_size,
                                    const uint32_t *without,
                                    size_t count);

// How often the ranks have recovered or shrunk.
peerlane_status peerlane_generation(const peerlane_comm *comm, uint64_t *generation);

// Says what this rank's calls have brought. `size` is sizeof(peerlane_usage).
peerlane_status peerlane_comm_usage(const peerlane_comm *comm, peerlane_usage *usage, size_t size);

// Lets the sizes of mailboxes and staging areas follow the calls since the last time, if
// `peerlane_config.adaptive` was set; *changed says whether there is new memory. All ranks call it, each
// from its thread or process, after the same calls. Waits for the others, and for this rank's calls if
// sizes change, for as long as the deadline. On failure all ranks go on with the memory they have. A
// rank with calls captured in a CUDA graph refuses for all. The stream of the last call still exists.
peerlane_status peerlane_comm_adapt(peerlane_comm *comm,
                                    int *changed);

// `peerlane_comm_adapt` for all ranks of a group of `peerlane_connect`, in rank order, by one thread.
peerlane_status peerlane_adapt_all(peerlane_comm *const *comms,
                                   uint32_t world_size,
                                   int *changed);

// Reduces `count` elements of all ranks into every rank's `dst`. `src` and `dst` are aligned to
// the element; they may be the same. `options` may be NULL.
peerlane_status peerlane_all_reduce(peerlane_comm *comm,
                                    const void *src,
                                    void *dst,
                                    size_t count,
                                    peerlane_dtype dtype,
                                    peerlane_op op,
                                    const peerlane_reduce_options *options,
                                    void *stream);

// Reduces world size x `count` elements of all ranks; rank r's `dst` gets the r-th part, `count`
// elements. `dst` may be this rank's own part of `src`. `options` may be NULL.
peerlane_status peerlane_reduce_scatter(peerlane_comm *comm,
                                        const void *src,
                                        void *dst,
                                        size_t count,
                                        peerlane_dtype dtype,
                                        peerlane_op op,
                                        const peerlane_reduce_options *options,
                                        void *stream);

// Copies every rank's `bytes` bytes to every rank's `dst`, in rank order: world size x `bytes`
// bytes. `src` may be this rank's part of `dst`.
peerlane_status peerlane_all_gather(peerlane_comm *comm,
                                    const void *src,
                                    void *dst,
                                    size_t bytes,
                                    void *stream);

// Copies the root's `bytes` bytes to every rank's `data`. `options` may be NULL.
peerlane_status peerlane_broadcast(peerlane_comm *comm,
                                   void *data,
                                   size_t bytes,
                                   uint32_t root,
                                   const peerlane_broadcast_options *options,
                                   void *stream);

// Joins the ranks' tensors along their last dimension in the root's `dst`. Rank r brings `rows`
// rows of `widths[r]` bytes in `src`; the root's `dst` has `rows` rows of all widths together, in
// rank order. A rank whose width is 0 brings nothing and, unless it is the root, need not call.
// `widths` are `width_count` = world size numbers. `dst` is used on the root only.
peerlane_status peerlane_gather(peerlane_comm *comm,
                                const void *src,
                                void *dst,
                                size_t rows,
                                const size_t *widths,
                                size_t width_count,
                                uint32_t root,
                                void *stream);

// Holds `stream` until every rank has queued its barrier and reached it. The host does not wait.
peerlane_status peerlane_barrier(peerlane_comm *comm, void *stream);

// `peerlane_all_reduce` beside `stream`: begins once `stream` has come to it, and runs on a stream
// of the communicator's own while `stream` goes on. The tensors stay alive and untouched until the
// work is done, whatever becomes of its handle. On failure *work is NULL.
peerlane_status peerlane_all_reduce_async(peerlane_comm *comm,
                                          const void *src,
                                          void *dst,
                                          size_t count,
                                          peerlane_dtype dtype,
                                          peerlane_op op,
                                          const peerlane_reduce_options *options,
                                          void *stream,
                                          peerlane_work **work);

// `peerlane_reduce_scatter` beside `stream`, as `peerlane_all_reduce_async`.
peerlane_status peerlane_reduce_scatter_async(peerlane_comm *comm,
                                              const void *src,
                                              void *dst,
                                              size_t count,
                                              peerlane_dtype dtype,
                                              peerlane_op op,
                                              const peerlane_reduce_options *options,
                                              void *stream,
                                              peerlane_work **work);

// `peerlane_all_gather` beside `stream`, as `peerlane_all_reduce_async`.
peerlane_status peerlane_all_gather_async(peerlane_comm *comm,
                                          const void *src,
                                          void *dst,
                                          size_t bytes,
                                          void *stream,
                                          peerlane_work **work);

// `peerlane_broadcast` beside `stream`, as `peerlane_all_reduce_async`.
peerlane_status peerlane_broadcast_async(peerlane_comm *comm,
                                         void *data,
                                         size_t bytes,
                                         uint32_t root,
                                         const peerlane_broadcast_options *options,
                                         void *stream,
                                         peerlane_work **work);

// `peerlane_gather` beside `stream`, as `peerlane_all_reduce_async`. `widths` may be reused when the
// call returns.
peerlane_status peerlane_gather_async(peerlane_comm *comm,
                                      const void *src,
                                      void *dst,
                                      size_t rows,
                                      const size_t *widths,
                                      size_t width_count,
                                      uint32_t root,
                                      void *stream,
                                      peerlane_work **work);

// Reduces a tensor in chunks as a producer finishes them: one all-reduce a chunk, in the order of
// `chunks`, each once its event has come, on a stream of the communicator's own. All ranks bring
// the same chunks; what no chunk names stays as it is. The events are recorded before the call is
// made and stay until it returns. `works` has room for `chunk_count` handles, one a chunk. On failure
// all of them are NULL, and chunks before the one that failed may have been queued: the tensors
// stay until the communicator is closed.
peerlane_status peerlane_all_reduce_chunks(peerlane_comm *comm,
                                           const void *src,
                                           void *dst,
                                           size_t count,
                                           peerlane_dtype dtype,
                                           peerlane_op op,
                                           const peerlane_reduce_options *options,
                                           const peerlane_chunk *chunks,
                                           size_t chunk_count,
                                           peerlane_work **works);

// Whether the call is done, well or not; `peerlane_work_wait` says which. Does not wait. An error if
// the call was captured in a graph.
peerlane_status peerlane_work_query(const peerlane_work *work,
                                    bool *done);

// Makes `stream`, one of the same GPU, wait for the call. The host does not wait. Inside a capture this
// is how the call's stream is joined.
peerlane_status peerlane_work_wait_on(const peerlane_work *work,
                                      void *stream);

// Waits on the host until the call is done, and says whether it and all calls before it went well.
// Says the same however often it is asked. An error if the call was captured in a graph.
peerlane_status peerlane_work_wait(const peerlane_work *work);

// Frees the handle; the call goes on if it is not done, and its tensors must stay until it is. Fine
// with NULL.
void peerlane_work_free(peerlane_work *work);

// Makes an event, for `peerlane_all_reduce_chunks`. Events of the CUDA runtime or of a framework do
// just as well.
peerlane_status peerlane_event_create(const peerlane_gpu *gpu, void **event);

// Records an event of `peerlane_event_create` behind everything queued on `stream`.
peerlane_status peerlane_event_record(const peerlane_gpu *gpu, void *event, void *stream);

// Destroys an event of `peerlane_event_create`; what waits for its record still does. Fine with NULL.
peerlane_status peerlane_event_destroy(const peerlane_gpu *gpu,
                                       void *event);

// Lets every rank reach `bytes` bytes at `tensor` of every other: the same size on every rank, at a
// multiple of 16. Every rank calls it, from a thread or a process of its own, and waits for the others, but no
// longer than the deadline. All ranks succeed, or none does. The memory stays allocated until
// `peerlane_deregister` has returned or all ranks have closed their communicators, and as long as a graph
// exists in which a call on it was captured. On failure *registration is NULL.
peerlane_status peerlane_register(peerlane_comm *comm,
                                  void *tensor,
                                  size_t bytes,
                                  peerlane_registration **registration);

// `peerlane_register` for one thread that has all ranks of a group: rank r's communicator is `comms[r]`, its
// tensor `tensors[r]`, its registration `registrations[r]`. On failure all of these are NULL, unless it is
// `world_size` that is refused.
peerlane_status peerlane_register_all(peerlane_comm *const *comms,
                                      uint32_t world_size,
                                      void *const *tensors,
                                      size_t bytes,
                                      peerlane_registration **registrations);

// Ends the use of a registration, after everything queued on this rank's GPU. Every rank calls it, as
// `peerlane_register`. Once it has returned no rank maps the memory any more. The handle is still to be freed.
peerlane_status peerlane_deregister(peerlane_comm *comm,
                                    const peerlane_registration *registration);

// `peerlane_deregister` for one thread that has all ranks of a group, in rank order.
peerlane_status peerlane_deregister_all(peerlane_comm *const *comms,
                                        uint32_t world_size,
                                        peerlane_registration *const *registrations);

// Frees the handle and tells nobody: the tensors stay mapped, and must stay allocated, until the communicators
// are closed. Fine with NULL.
void peerlane_registration_free(peerlane_registration *registration);

// Reduces `count` elements of all ranks' registered tensors, in place and without a mailbox: those from byte `offset` on,
// a multiple of 16 that is the same on every rank. `options` may be NULL; its algorithm must be
// PEERLANE_ALGORITHM_AUTO.
peerlane_status peerlane_all_reduce_registered(peerlane_comm *comm,
                                               const peerlane_registration *registration,
                                               size_t offset,
                                               size_t count,
                                               peerlane_dtype dtype,
                                               peerlane_op op,
                                               const peerlane_reduce_options *options,
                                               void *stream);

// Makes a channel of `capacity` bytes, 4096 to 2^32, rounded up to a power of two, for `readers` readers, 1 to 32.
// On failure *writer is NULL.
peerlane_status peerlane_channel_create(uint64_t capacity,
                                        uint32_t readers,
                                        peerlane_channel_writer **writer);

// The text by which a reader opens the channel, in any process of this user. Valid until the writer is closed; NULL
// if NULL came.
const char *peerlane_channel_handle(const peerlane_channel_writer *writer);

// Opens the channel of `handle` as reader `index`, which nobody has done before. On failure *reader is NULL.
peerlane_status peerlane_channel_open(const char *handle,
                                      uint32_t index,
                                      peerlane_channel_reader **reader);

// Sends a message of `bytes` bytes, and what was staged, to `readers`, a bit each. `kind` and `flags` are the caller's.
// Waits for space for up to `timeout_ms` milliseconds; after PEERLANE_TIMEOUT nothing has changed. `sequence` may be
// NULL.
peerlane_status peerlane_channel_send(peerlane_channel_writer *writer,
                                      uint32_t readers,
                                      uint16_t kind,
                                      uint16_t flags,
                                      const void *payload,
                                      size_t bytes,
                                      uint64_t timeout_ms,
                                      uint64_t *sequence);

// As `peerlane_channel_send`, but readers see the message with the next publish or send.
peerlane_status peerlane_channel_stage(peerlane_channel_writer *writer,
                                       uint32_t readers,
                                       uint16_t kind,
                                       uint16_t flags,
                                       const void *payload,
                                       size_t bytes,
                                       uint64_t timeout_ms,
                                       uint64_t *sequence);

// Lets the readers see what was staged, with one wake-up at most for all of them.
peerlane_status peerlane_channel_publish(peerlane_channel_writer *writer);

// Receives the next message into the `capacity` bytes at `payload`; waits for up to `timeout_ms` milliseconds, 0 for
// none. A message that is larger is PEERLANE_INVALID_ARGUMENT: `message->bytes` says how large it is, and it stays the
// next one. `message` may be NULL.
peerlane_status peerlane_channel_recv(peerlane_channel_reader *reader,
                                      void *payload,
                                      size_t capacity,
                                      uint64_t timeout_ms,
                                      peerlane_channel_message *message);

// For how many microseconds the writer's waits spin before they sleep; 20 unless told otherwise.
peerlane_status peerlane_channel_writer_set_spin(peerlane_channel_writer *writer, uint64_t spin_us);

// As `peerlane_channel_writer_set_spin`, of a reader.
peerlane_status peerlane_channel_reader_set_spin(peerlane_channel_reader *reader, uint64_t spin_us);

// Goes on without a reader, dead or alive.
peerlane_status peerlane_channel_forget(peerlane_channel_writer *writer, uint32_t reader);

// Ends the channel at once, and every wait on every side, with PEERLANE_ABORTED. Any thread may call it, also while
// another uses the writer. Fine with NULL.
void peerlane_channel_writer_poison(const peerlane_channel_writer *writer,
                                    uint32_t reason);

// As `peerlane_channel_writer_poison`, by a reader.
void peerlane_channel_reader_poison(const peerlane_channel_reader *reader, uint32_t reason);

// Closes the channel and frees the handle: readers receive what was sent before, then PEERLANE_CLOSED. No other call
// may be using it. Fine with NULL.
void peerlane_channel_writer_close(peerlane_channel_writer *writer);

// Closes this end and frees the handle: sending to it is PEERLANE_CLOSED from then on. No other call may be using it.
// Fine with NULL.
void peerlane_channel_reader_close(peerlane_channel_reader *reader);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PEERLANE_H */
