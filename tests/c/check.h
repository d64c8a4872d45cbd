/* What the C tests say when something is not as it should be. Exit status 1, and the first such thing. */

#ifndef PEERLANE_TEST_CHECK_H
#define PEERLANE_TEST_CHECK_H

#include "peerlane.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *file, int line, const char *what) {
    fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, peerlane_last_error());
    exit(1);
}

/* The call goes well. */
#define OK(call)                                                    \
    do {                                                            \
        if ((call) != PEERLANE_OK) fail(__FILE__, __LINE__, #call); \
    } while (0)

#define TRUE(what)                                     \
    do {                                               \
        if (!(what)) fail(__FILE__, __LINE__, #what);  \
    } while (0)

/* The call fails with this status, in words that hold both fragments. */
#define REFUSED(status, first, second, call)                        \
    do {                                                            \
        const peerlane_status came = (call);                        \
        if (came != (status)) fail(__FILE__, __LINE__, peerlane_status_name(came)); \
        TRUE(strstr(peerlane_last_error(), (first)) != NULL);       \
        TRUE(strstr(peerlane_last_error(), (second)) != NULL);      \
    } while (0)

#endif
