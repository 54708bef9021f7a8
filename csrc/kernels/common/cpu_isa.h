// Versions of the CPU kernels for several instruction sets, and the choice of the one that runs.
//
// A kernel is an inlined function, which CpuVersion compiles for an instruction set. Everything
// that it calls must be inlined too, so helpers are marked PYPKG_INLINE.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define PYPKG_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__)
#define PYPKG_CPU_VERSIONS 1
#endif

namespace pypkg {

// Levels of the x86-64 psABI; other processors have the baseline only.
enum class CpuIsa : int { kBaseline = 0, kV3 = 1, kV4 = 2 };

// The name of a version is unknown, or this processor does not have its instruction set.
struct CpuIsaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The version in use: that of set_cpu_isa, else of the environment variable PYPKG_CPU_ISA, else the
// widest that this processor can run. Throws CpuIsaError if the variable is invalid.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);  // "x86-64", "x86-64-v3", "x86-64-v4"; "baseline" elsewhere
// Names of the versions that this processor runs, the widest last.
std::vector<std::string> cpu_isa_names();
// Chooses a version by its name; an empty one restores the default. Throws CpuIsaError.
void set_cpu_isa(const std::string& name);
// Whether the version in use and the processor have the AVX512_BF16 instructions (AMD from Zen 4,
// Intel from Cooper Lake).
bool cpu_has_bfloat16();

template <CpuIsa kIsa, auto kKernel>
struct CpuVersion;

#define PYPKG_CPU_VERSION(isa, attributes)                                                 \
  template <class Result, class... Arguments, Result (*kKernel)(Arguments...)>             \
  struct CpuVersion<isa, kKernel> {                                                        \
    attributes static Result run(Arguments... arguments) { return kKernel(arguments...); } \
  };
PYPKG_CPU_VERSION(CpuIsa::kBaseline, )
#if PYPKG_CPU_VERSIONS
PYPKG_CPU_VERSION(CpuIsa::kV3, __attribute__((target("avx2,fma"))))
PYPKG_CPU_VERSION(CpuIsa::kV4, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512cd,"
                                                     "avx512dq,avx512vl"))))
#endif
#undef PYPKG_CPU_VERSION

// Calls function(std::integral_constant<CpuIsa, ...>) for the version in use. It may throw, so it
// must be called outside of parallel regions.
template <class Function>
decltype(auto) dispatch_cpu_isa(Function&& function) {
#if PYPKG_CPU_VERSIONS
  switch (cpu_isa()) {
    case CpuIsa::kV4: return function(std::integral_constant<CpuIsa, CpuIsa::kV4>{});
    case CpuIsa::kV3: return function(std::integral_constant<CpuIsa, CpuIsa::kV3>{});
    case CpuIsa::kBaseline: break;
  }
#endif
  return function(std::integral_constant<CpuIsa, CpuIsa::kBaseline>{});
}

// The version in use of a kernel, as a pointer to a function.
template <auto kKernel>
auto cpu_version() {
  return dispatch_cpu_isa(
      [](auto isa) -> decltype(kKernel) { return &CpuVersion<isa(), kKernel>::run; });
}

}  // namespace pypkg
