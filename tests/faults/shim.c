/* Faults for test_storage.py, by LD_PRELOAD: calls on named files fail, are slow or do half.
 *
 * FAULTS        rules, one a line: CALL PATTERN ACTION FIRST COUNT
 *               CALL    open, read, write, fsync, flock or rename (each with its relatives)
 *               PATTERN of fnmatch, for the file's path; of rename, for the new one
 *               ACTION  a number to set errno to, "sleep:MILLISECONDS", or "short": do half
 *               FIRST   how many calls that match go well before; COUNT: how many then do not
 * FAULTS_STATE  file with two 64-bit counters a rule, shared by all processes: calls that matched,
 *               and those that met the fault
 * FAULTS_CLOCK  seconds after which the clock of the wall jumps: a day back, then a day forward
 *
 * Files that no rule names are left alone, and so is everything that Ray does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define RULES 32
#define DAY 86400
#define REAL(type, name, ...)                                                                      \
    static type (*real)(__VA_ARGS__);                                                              \
    if (!real)                                                                                     \
    *(void **)&real = dlsym(RTLD_NEXT, #name)

struct rule {
    char call[16], pattern[PATH_MAX], action[32];
    long first, count;
};
static struct rule rules[RULES];
static int rule_count;
static uint64_t *state;
static double period;

/* Calls from here come before there are rules. */
__attribute__((constructor)) static void load(void) {
    const char *text = getenv("FAULTS"), *file = getenv("FAULTS_STATE");
    const char *clock = getenv("FAULTS_CLOCK");
    if (clock)
        period = atof(clock);
    if (!text || !file)
        return;
    int handle = open(file, O_RDWR | O_CLOEXEC);
    if (handle < 0)
        return;
    void *shared =
        mmap(NULL, RULES * 2 * sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
    close(handle);
    if (shared == MAP_FAILED)
        return;
    char *copy = strdup(text), *rest = copy;
    for (char *line; (line = strsep(&rest, "\n")) && rule_count < RULES;) {
        struct rule *rule = &rules[rule_count];
        if (sscanf(line, "%15s %4095s %31s %ld %ld", rule->call, rule->pattern, rule->action,
                   &rule->first, &rule->count) == 5)
            rule_count++;
    }
    free(copy);
    state = shared;
}

/* 0: the call is to go on; 1: it is to do half; -1: it is to fail, errno is set. */
static int fault(const char *call, const char *path) {
    int before = errno, half = 0;
    for (int i = 0; i < rule_count; i++) {
        const struct rule *rule = &rules[i];
        if (strcmp(rule->call, call) || fnmatch(rule->pattern, path, 0))
            continue;
        long turn = (long)__atomic_fetch_add(&state[2 * i], 1, __ATOMIC_SEQ_CST);
        if (turn < rule->first || turn >= rule->first + rule->count)
            continue;
        __atomic_fetch_add(&state[2 * i + 1], 1, __ATOMIC_SEQ_CST);
        if (!strcmp(rule->action, "short")) {
            half = 1;
        } else if (!strncmp(rule->action, "sleep:", 6)) {
            usleep((useconds_t)atol(rule->action + 6) * 1000);
        } else {
            errno = atoi(rule->action);
            return -1;
        }
    }
    errno = before;
    return half;
}

static int fault_at(const char *call, int handle) {
    char link[64], path[PATH_MAX];
    if (!state)
        return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length <= 0 || path[0] != '/') /* a socket, a pipe */
        return 0;
    path[length] = 0;
    return fault(call, path);
}

static int fault_by_name(const char *call, const char *path) {
    return state && path ? fault(call, path) : 0;
}

static size_t part(int how, size_t size) { return how && size > 1 ? size / 2 : size; }

#define TRANSFER(name, call, buffer)                                                               \
    ssize_t name(int handle, buffer data, size_t size) {                                           \
        REAL(ssize_t, name, int, buffer, size_t);                                                  \
        int how = fault_at(call, handle);                                                          \
        return how < 0 ? -1 : real(handle, data, part(how, size));                                 \
    }
#define TRANSFER_AT(name, call, buffer)                                                            \
    ssize_t name(int handle, buffer data, size_t size, off_t offset) {                             \
        REAL(ssize_t, name, int, buffer, size_t, off_t);                                           \
        int how = fault_at(call, handle);                                                          \
        return how < 0 ? -1 : real(handle, data, part(how, size), offset);                         \
    }
#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        REAL(int, name, const char *, int, ...);                                                   \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = va_arg(more, mode_t);                                                        \
        va_end(more);                                                                              \
        return fault_by_name("open", path) < 0 ? -1 : real(path, flags, mode);                     \
    }
#define SYNC(name)                                                                                 \
    int name(int handle) {                                                                         \
        REAL(int, name, int);                                                                      \
        return fault_at("fsync", handle) < 0 ? -1 : real(handle);                                  \
    }

TRANSFER(read, "read", void *)
TRANSFER(write, "write", const void *)
TRANSFER_AT(pread, "read", void *)
TRANSFER_AT(pread64, "read", void *)
TRANSFER_AT(pwrite, "write", const void *)
TRANSFER_AT(pwrite64, "write", const void *)
OPEN(open)
OPEN(open64)
SYNC(fsync)
SYNC(fdatasync)

int flock(int handle, int operation) {
    REAL(int, flock, int, int);
    return fault_at("flock", handle) < 0 ? -1 : real(handle, operation);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return fault_by_name("rename", to) < 0 ? -1 : real(from, to);
}

/* Seconds that the wall's clock is off by now. All processes see the same. */
static time_t jump(void) {
    static int (*real)(clockid_t, struct timespec *);
    struct timespec now;
    if (!period)
        return 0;
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    real(CLOCK_MONOTONIC, &now);
    long turn = (long)((double)now.tv_sec / period) % 3;
    return turn == 0 ? 0 : turn == 1 ? -DAY : DAY;
}

int clock_gettime(clockid_t which, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int result = real(which, now);
    if (!result && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
        now->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(int, gettimeofday, struct timeval *, void *);
    int result = real(now, zone);
    if (!result)
        now->tv_sec += jump();
    return result;
}

time_t time(time_t *store) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (store)
        *store = now.tv_sec;
    return now.tv_sec;
}
