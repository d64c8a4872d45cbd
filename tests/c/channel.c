/* Channels between threads: payloads, batches, readers that are not addressed, ends, and what is refused.
 *
 * host/tests/c_interface.rs compiles this against host/include/peerlane.h, links it with
 * libpeerlane.so and runs it. Exit status 0: all is right; else the first thing that is not was
 * printed. */

#include "check.h"

#include <pthread.h>

enum { READERS = 2, MESSAGES = 2000, LARGEST = 700 };
static const uint64_t LONG_MS = 60000;

static uint8_t expected(uint64_t sequence, size_t at) {
    return (uint8_t)(sequence * 31 + at);
}

typedef struct {
    const char *handle;
    uint32_t index;
    uint64_t received;
} listener;

/* Every message that is for everybody or, by its kind, for this reader. */
static void *listen(void *argument) {
    listener *own = argument;
    peerlane_channel_reader *reader;
    uint8_t payload[LARGEST];
    uint64_t last = 0;
    OK(peerlane_channel_open(own->handle, own->index, &reader));
    OK(peerlane_channel_reader_set_spin(reader, 5));
    for (;;) {
        peerlane_channel_message message;
        peerlane_status status = peerlane_channel_recv(reader, payload, sizeof payload, LONG_MS, &message);
        if (status == PEERLANE_CLOSED) break;
        OK(status);
        TRUE(message.sequence > last && message.bytes == message.sequence % LARGEST);
        TRUE(message.kind == 0 || message.kind == own->index + 1);
        TRUE(message.flags == (uint16_t)message.sequence);
        for (size_t i = 0; i < message.bytes; i++) TRUE(payload[i] == expected(message.sequence, i));
        last = message.sequence;
        own->received++;
    }
    peerlane_channel_reader_close(reader);
    return NULL;
}

static void messages_arrive(void) {
    peerlane_channel_writer *writer;
    pthread_t threads[READERS];
    listener listeners[READERS];
    uint64_t wanted[READERS] = {0, 0};
    OK(peerlane_channel_create(8192, READERS, &writer));
    for (uint32_t i = 0; i < READERS; i++) {
        listeners[i] = (listener){peerlane_channel_handle(writer), i, 0};
        TRUE(pthread_create(&threads[i], NULL, listen, &listeners[i]) == 0);
    }
    for (uint64_t n = 1; n <= MESSAGES; n++) {
        uint8_t payload[LARGEST];
        uint64_t sequence = 0;
        /* To everybody, to one reader, to the other. */
        uint32_t kind = (uint32_t)(n % (READERS + 1));
        uint32_t mask = kind == 0 ? PEERLANE_CHANNEL_EVERYBODY : 1u << (kind - 1);
        for (size_t i = 0; i < n % LARGEST; i++) payload[i] = expected(n, i);
        /* Batches of seven; one that does not fit is shown in parts. */
        if (n % 7 == 0)
            OK(peerlane_channel_send(writer, mask, (uint16_t)kind, (uint16_t)n, payload, n % LARGEST, LONG_MS, &sequence));
        else
            OK(peerlane_channel_stage(writer, mask, (uint16_t)kind, (uint16_t)n, payload, n % LARGEST, LONG_MS, &sequence));
        TRUE(sequence == n);
        for (uint32_t i = 0; i < READERS; i++) wanted[i] += kind == 0 || kind == i + 1;
    }
    OK(peerlane_channel_publish(writer));
    peerlane_channel_writer_close(writer);
    for (uint32_t i = 0; i < READERS; i++) {
        TRUE(pthread_join(threads[i], NULL) == 0);
        TRUE(listeners[i].received == wanted[i]);
    }
}

static void small_room_loses_nothing(void) {
    peerlane_channel_writer *writer;
    peerlane_channel_reader *reader;
    peerlane_channel_message message;
    char payload[16];
    OK(peerlane_channel_create(4096, 1, &writer));
    OK(peerlane_channel_open(peerlane_channel_handle(writer), 0, &reader));
    REFUSED(PEERLANE_TIMEOUT, "channel", "writer", peerlane_channel_recv(reader, payload, 16, 0, NULL));
    OK(peerlane_channel_send(writer, 1, 7, 9, "sixteen letters", 16, 0, NULL));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "capacity", "16 bytes at least",
            peerlane_channel_recv(reader, payload, 15, 0, &message));
    TRUE(message.bytes == 16 && message.sequence == 1 && message.kind == 7 && message.flags == 9);
    REFUSED(PEERLANE_INVALID_ARGUMENT, "payload", "NULL", peerlane_channel_recv(reader, NULL, 16, 0, &message));
    OK(peerlane_channel_recv(reader, payload, 16, 0, NULL));
    TRUE(strcmp(payload, "sixteen letters") == 0);
    /* Of nothing there is nothing to point to. */
    OK(peerlane_channel_send(writer, 1, 0, 0, NULL, 0, 0, NULL));
    OK(peerlane_channel_recv(reader, NULL, 0, 0, &message));
    TRUE(message.bytes == 0 && message.sequence == 2);
    peerlane_channel_reader_close(reader);
    REFUSED(PEERLANE_CLOSED, "reader 0", "closed", peerlane_channel_send(writer, 1, 0, 0, NULL, 0, 0, NULL));
    peerlane_channel_writer_close(writer);
}

static void ends_are_told(void) {
    peerlane_channel_writer *writer;
    peerlane_channel_reader *reader;
    OK(peerlane_channel_create(4096, 2, &writer));
    OK(peerlane_channel_open(peerlane_channel_handle(writer), 1, &reader));
    OK(peerlane_channel_writer_set_spin(writer, 0));
    OK(peerlane_channel_forget(writer, 0));
    OK(peerlane_channel_send(writer, PEERLANE_CHANNEL_EVERYBODY, 0, 0, "x", 1, 0, NULL));
    peerlane_channel_reader_poison(reader, 77);
    REFUSED(PEERLANE_ABORTED, "77", "reader 1", peerlane_channel_send(writer, 2, 0, 0, "y", 1, 0, NULL));
    REFUSED(PEERLANE_ABORTED, "77", "reader 1", peerlane_channel_recv(reader, NULL, 0, 0, NULL));
    peerlane_channel_writer_poison(writer, 1);
    peerlane_channel_reader_close(reader);
    peerlane_channel_writer_close(writer);
}

static void mistakes_are_named(void) {
    peerlane_channel_writer *writer = (peerlane_channel_writer *)1;
    peerlane_channel_reader *reader = (peerlane_channel_reader *)1;
    REFUSED(PEERLANE_INVALID_ARGUMENT, "writer", "NULL", peerlane_channel_create(4096, 1, NULL));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "readers", "33", peerlane_channel_create(4096, 33, &writer));
    TRUE(writer == NULL);
    REFUSED(PEERLANE_INVALID_ARGUMENT, "handle", "NULL", peerlane_channel_open(NULL, 0, &reader));
    TRUE(reader == NULL);
    REFUSED(PEERLANE_INVALID_ARGUMENT, "handle", "nonsense", peerlane_channel_open("nonsense", 0, &reader));
    OK(peerlane_channel_create(4096, 1, &writer));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "payload", "NULL", peerlane_channel_send(writer, 1, 0, 0, NULL, 1, 0, NULL));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "writer", "NULL", peerlane_channel_publish(NULL));
    REFUSED(PEERLANE_INVALID_ARGUMENT, "reader", "NULL", peerlane_channel_recv(NULL, NULL, 0, 0, NULL));
    TRUE(peerlane_channel_handle(NULL) == NULL);
    peerlane_channel_writer_poison(NULL, 0);
    peerlane_channel_reader_poison(NULL, 0);
    peerlane_channel_writer_close(writer);
    peerlane_channel_writer_close(NULL);
    peerlane_channel_reader_close(NULL);
}

int main(void) {
    messages_arrive();
    small_room_loses_nothing();
    ends_are_told();
    mistakes_are_named();
    puts("all is right");
    return 0;
}
