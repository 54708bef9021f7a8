// Preloaded into the fork server: what gloo and Paddle's TCPStore waste where ranks share cores.
//
// TCPStore writes each request and each answer in several small pieces. With Nagle's algorithm the
// second piece waits for the acknowledgement of the first, which the other side delays by 40 ms.
// The groups of four ranks take a hundred of these waits, 4 s, to set up.
//
// A thread of gloo waits for packets. It leaves a packet where it is while the main thread holds
// the lock of the connection, and asks for packets again, at once. If the main thread does not run
// at that time, the other one takes its core until the scheduler steps in: up to a third of
// the processor time of four ranks on two cores.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static const useconds_t kPause = 50;  // microseconds
// Whether this thread was told of a packet and has not received it.
static __thread int left_a_packet;

static void* next_of(void** cache, const char* name) {
  if (*cache == NULL) *cache = dlsym(RTLD_NEXT, name);
  return *cache;
}

static int no_delay(int file) {
  const int on = 1;
  setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // fails for other kinds: no matter
  return file;
}

int connect(int file, const struct sockaddr* address, socklen_t size) {
  static void* cache;
  int (*next)(int, const struct sockaddr*, socklen_t) = next_of(&cache, "connect");
  return next(no_delay(file), address, size);
}

int accept(int file, struct sockaddr* address, socklen_t* size) {
  static void* cache;
  int (*next)(int, struct sockaddr*, socklen_t*) = next_of(&cache, "accept");
  return no_delay(next(file, address, size));
}

ssize_t recv(int file, void* buffer, size_t size, int flags) {
  static void* cache;
  ssize_t (*next)(int, void*, size_t, int) = next_of(&cache, "recv");
  left_a_packet = 0;
  return next(file, buffer, size, flags);
}

int epoll_wait(int file, struct epoll_event* events, int size, int timeout) {
  static void* cache;
  int (*next)(int, struct epoll_event*, int, int) = next_of(&cache, "epoll_wait");
  if (left_a_packet) usleep(kPause);
  const int found = next(file, events, size, timeout);
  left_a_packet = found > 0;
  return found;
}
