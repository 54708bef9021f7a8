#include "data/mapped_file.h"

#include <fcntl.h>
#include <pybind11/numpy.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace pypkg {
namespace {

class LostFileError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Entries are never freed, because a signal handler iterates over them. Closed ones are reused.
struct Mapping {
  std::atomic<const char*> begin{nullptr};  // null: closed
  std::atomic<size_t> bytes{0};
  std::string path;  // changed only while the entry is closed
  Mapping* next = nullptr;
};

std::atomic<Mapping*> mappings{nullptr};
std::atomic<Mapping*> lost{nullptr};  // the last mapping with bytes that could not be read
std::mutex changing;                  // guards changes of the list
struct sigaction previous_action;
// initial-exec, because other models of thread-local storage may allocate in the signal handler.
__attribute__((tls_model("initial-exec"))) thread_local int guarded = 0;

constexpr char kWhatHappened[] =
    " cannot be read to the end of what is mapped: it was truncated or replaced, or its disk "
    "fails. Restore the file, then start the same command again.";

Mapping* mapping_of(const void* address) {
  const char* place = static_cast<const char*>(address);
  for (Mapping* each = mappings.load(); each != nullptr; each = each->next) {
    const char* begin = each->begin.load();
    if (begin != nullptr && place >= begin && place < begin + each->bytes.load()) return each;
  }
  return nullptr;
}

void say(const char* text) {
  if (write(STDERR_FILENO, text, std::strlen(text)) < 0) return;
}

// Only calls functions that POSIX or Linux allows in a signal handler.
void on_sigbus(int number, siginfo_t* info, void*) {
  const bool of_memory = info->si_code > 0;
  Mapping* mapping = of_memory ? mapping_of(info->si_addr) : nullptr;
  if (mapping == nullptr) {  // not ours: the repeated read, or signal, reaches the previous handler
    sigaction(SIGBUS, &previous_action, nullptr);
    if (!of_memory) raise(number);
    return;
  }
  lost.store(mapping);
  if (guarded > 0) {
    const auto page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t page = reinterpret_cast<uintptr_t>(info->si_addr) / page_bytes * page_bytes;
    void* zeros = mmap(reinterpret_cast<void*>(page), page_bytes, PROT_READ,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (zeros != MAP_FAILED) return;
  }
  say("error: ");
  say(mapping->path.c_str());
  say(kWhatHappened);
  say("\n");
  _exit(2);
}

// Called for every file, because Paddle and faulthandler install their own handlers when they
// start.
void install_handler() {
  struct sigaction current;
  sigaction(SIGBUS, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_sigbus) return;
  previous_action = current;
  struct sigaction action = {};
  action.sa_sigaction = on_sigbus;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
}

Mapping* remember(const char* begin, size_t bytes, const std::string& path) {
  const std::lock_guard<std::mutex> lock(changing);
  Mapping* entry = mappings.load();
  while (entry != nullptr && entry->begin.load() != nullptr) entry = entry->next;
  const bool is_new = entry == nullptr;
  if (is_new) entry = new Mapping;
  entry->path = path;
  entry->bytes.store(bytes);
  entry->begin.store(begin);
  if (is_new) {
    entry->next = mappings.load();
    mappings.store(entry);
  }
  return entry;
}

void unmap(void* pointer) {
  auto* entry = static_cast<Mapping*>(pointer);
  const std::lock_guard<std::mutex> lock(changing);
  munmap(const_cast<char*>(entry->begin.load()), entry->bytes.load());
  Mapping* closed = entry;
  lost.compare_exchange_strong(closed, nullptr);
  entry->begin.store(nullptr);
}

[[noreturn]] void throw_os_error(const std::string& path) {
  PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
  throw py::error_already_set();
}

py::array_t<uint8_t> map_file(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw_os_error(path);
  struct stat status;
  void* begin = MAP_FAILED;
  bool known = fstat(file, &status) == 0;
  if (known && S_ISDIR(status.st_mode)) {
    known = false;
    errno = EISDIR;
  }
  const size_t bytes = known ? static_cast<size_t>(status.st_size) : 0;
  if (bytes > 0) begin = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
  const int error = errno;
  close(file);                                              // the mapping does not need it
  if (known && bytes == 0) return py::array_t<uint8_t>(0);  // an empty file cannot be mapped
  if (begin == MAP_FAILED) {
    errno = error;
    throw_os_error(path);
  }
  install_handler();
  py::capsule owner(remember(static_cast<const char*>(begin), bytes, path), unmap);
  py::array_t<uint8_t> array(static_cast<py::ssize_t>(bytes), static_cast<const uint8_t*>(begin),
                             owner);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

}  // namespace

MappedReads::MappedReads() { ++guarded; }

MappedReads::~MappedReads() { --guarded; }

void MappedReads::check() const {
  if (const Mapping* mapping = lost.load()) {
    throw LostFileError(mapping->path + kWhatHappened);
  }
}

void bind_mapped_file(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const LostFileError& error) {
      py::set_error(py::module_::import("pypkg.errors").attr("UserError"), error.what());
    }
  });
  module.def("map_file", &map_file, py::arg("path"),
             R"doc(uint8 [bytes] of a file, mapped into memory, read-only; no descriptor stays open.

Where the mapped bytes are lost later, SampleReader.read raises UserError, and any other read ends
the process with a message; both name the file.

Args:
    path: str, or bytes as os.fsencode gives.

Raises:
    OSError: the file cannot be opened or mapped.)doc");
}

}  // namespace pypkg
