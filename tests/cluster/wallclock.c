/* A wall clock that jumps for the processes it is preloaded into: by the seconds that the file $WALLCLOCK_JUMP holds.

   Nothing but the wall clock is touched, as when a clock is set. libfaketime 0.9.10 cannot be used for it: it takes
   waits on the monotonic clock for ones on the wall clock, so that Python 3.11's time.sleep fails (EINVAL) and the
   interpreter's lock changes hands a hundred times more slowly. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static long jump(void) {
  const char *path = getenv("WALLCLOCK_JUMP");
  char text[32] = {0};
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return 0;
  ssize_t got = read(file, text, sizeof(text) - 1);
  close(file);
  return got > 0 ? atol(text) : 0;
}

int clock_gettime(clockid_t id, struct timespec *now) {
  REAL(clock_gettime);
  int failed = real(id, now);
  if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  REAL(gettimeofday);
  int failed = real(now, zone);
  if (!failed) now->tv_sec += jump();
  return failed;
}

time_t time(time_t *now) {
  REAL(time);
  time_t told = real(NULL) + jump();
  if (now) *now = told;
  return told;
}

/* The condition does not tell its clock; a monotonic one counts from the start of the machine. */
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
  REAL(pthread_cond_timedwait);
  struct timespec moved = *until;
  if (moved.tv_sec > 1000000000) moved.tv_sec -= jump();
  return real(condition, mutex, &moved);
}
