/* A slow disk: LD_PRELOAD makes what is written to regular files below a folder wait. The file CHAOS_DISK holds the
   milliseconds of a sync as a 64-bit number, 0 for none, and the folder; a write waits an eighth of that. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct state {
    volatile long milliseconds;
    char folder[4088];
};
static const struct state *state;

__attribute__((constructor)) static void map(void) {
    const char *path = getenv("CHAOS_DISK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *seen = file < 0 ? MAP_FAILED : mmap(0, sizeof(struct state), PROT_READ, MAP_SHARED, file, 0);
    if (seen != MAP_FAILED) state = seen;
    if (file >= 0) close(file);
}

static void wait_for(const char *path, int share) {
    long milliseconds = state->milliseconds;
    size_t length = strlen(state->folder);
    if (!milliseconds || strncmp(path, state->folder, length) || (path[length] != '/' && path[length])) return;
    long nanoseconds = milliseconds * 1000000 / share;
    struct timespec left = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, 0, &left, &left) == EINTR) continue; /* a disk hears no signals */
}

static void wait_file(int file, int share) {
    char name[32], path[PATH_MAX];
    struct stat what;
    int before = errno;
    if (!state || !state->milliseconds) return;
    if (!fstat(file, &what) && S_ISREG(what.st_mode)) {
        snprintf(name, sizeof name, "/proc/self/fd/%d", file);
        ssize_t length = readlink(name, path, sizeof path - 1);
        if (length > 0) {
            path[length] = 0;
            wait_for(path, share);
        }
    }
    errno = before;
}

static void wait_path(const char *path) {
    int before = errno;
    if (state && state->milliseconds && path) wait_for(path, 1);
    errno = before;
}

#define SLOW(result, name, parameters, arguments, waits)                                                               \
    result name parameters {                                                                                           \
        static result(*real) parameters;                                                                               \
        if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name);                                                          \
        waits;                                                                                                         \
        return real arguments;                                                                                         \
    }

SLOW(ssize_t, write, (int file, const void *data, size_t size), (file, data, size), wait_file(file, 8))
SLOW(ssize_t, writev, (int file, const struct iovec *data, int count), (file, data, count), wait_file(file, 8))
SLOW(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at), wait_file(file, 8))
SLOW(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at),
     wait_file(file, 8))
SLOW(ssize_t, pwritev, (int file, const struct iovec *data, int count, off_t at), (file, data, count, at),
     wait_file(file, 8))
SLOW(ssize_t, pwritev64, (int file, const struct iovec *data, int count, off64_t at), (file, data, count, at),
     wait_file(file, 8))
SLOW(int, ftruncate, (int file, off_t size), (file, size), wait_file(file, 8))
SLOW(int, ftruncate64, (int file, off64_t size), (file, size), wait_file(file, 8))
SLOW(int, fsync, (int file), (file), wait_file(file, 1))
SLOW(int, fdatasync, (int file), (file), wait_file(file, 1))
SLOW(int, rename, (const char *from, const char *to), (from, to), wait_path(to))
SLOW(int, unlink, (const char *path), (path), wait_path(path))
