// Preloaded into the fork server: TCP sockets send small packets at once.
//
// Paddle's TCPStore writes each request and each answer in several small pieces. With Nagle's
// algorithm the second piece waits for the acknowledgement of the first, which the other side
// delays by 40 ms. The groups of four ranks take a hundred of these waits, 4 s, to set up.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

static int no_delay(int file) {
  const int on = 1;
  setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // fails for other kinds: no matter
  return file;
}

int connect(int file, const struct sockaddr* address, socklen_t size) {
  int (*next)(int, const struct sockaddr*, socklen_t) = dlsym(RTLD_NEXT, "connect");
  return next(no_delay(file), address, size);
}

int accept(int file, struct sockaddr* address, socklen_t* size) {
  int (*next)(int, struct sockaddr*, socklen_t*) = dlsym(RTLD_NEXT, "accept");
  return no_delay(next(file, address, size));
}
