#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "common/common.h"

namespace pypkg {
namespace {

constexpr int64_t kFewElements = 1 << 15;  // about 10 us of a core

int read_default() {
  const char* text = std::getenv("PYPKG_NUM_THREADS");
  const int wanted = text ? std::atoi(text) : 0;
  return std::max(1, wanted > 0 ? wanted : omp_get_max_threads());
}

const int default_threads = read_default();
std::atomic<int> chosen_threads{0};

}  // namespace

void set_num_threads(int count) { chosen_threads = std::max(0, count); }

int num_threads() {
  const int count = chosen_threads;
  return count > 0 ? count : default_threads;
}

int threads_for(int64_t elements) { return elements < kFewElements ? 1 : num_threads(); }

}  // namespace pypkg
