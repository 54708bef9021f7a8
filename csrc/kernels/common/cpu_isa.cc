#include "common/cpu_isa.h"

#include <atomic>
#include <cstdlib>

namespace pypkg {
namespace {

constexpr const char* kVariable = "PYPKG_CPU_ISA";
constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

#if PYPKG_CPU_VERSIONS
constexpr const char* kNames[] = {"x86-64", "x86-64-v3", "x86-64-v4"};

// Whether this processor has the instructions of CpuVersion<isa>.
bool runs(CpuIsa isa) {
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case CpuIsa::kBaseline: return true;
    case CpuIsa::kV3: return v3;
    case CpuIsa::kV4: break;
  }
  return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#else
constexpr const char* kNames[] = {"baseline"};

bool runs(CpuIsa) { return true; }
#endif

// The version with that name, or the widest for an empty name. `source`: for the error message.
CpuIsa decide(const std::string& name, const std::string& source) {
  const std::vector<std::string> names = cpu_isa_names();
  if (name.empty()) return static_cast<CpuIsa>(names.size() - 1);
  std::string listed;
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<CpuIsa>(i);
    listed += (i ? ", " : "") + names[i];
  }
  throw CpuIsaError(source + " is '" + name +
                    "', but the CPU kernels that this processor can run " + "are those for " +
                    listed + "; name one of them, or none for the last");
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> cpu_isa_names() {
  std::vector<std::string> names;
  for (const char* name : kNames) {
    if (runs(static_cast<CpuIsa>(names.size()))) names.push_back(name);
  }
  return names;
}

CpuIsa cpu_isa() {
  const int known = chosen;
  if (known != kUndecided) return static_cast<CpuIsa>(known);
  const char* text = std::getenv(kVariable);
  const CpuIsa isa = decide(text ? text : "", kVariable);
  chosen = static_cast<int>(isa);
  return isa;
}

void set_cpu_isa(const std::string& name) {
  chosen = name.empty() ? kUndecided : static_cast<int>(decide(name, "the name of the version"));
}

bool cpu_has_bfloat16() {
#if PYPKG_CPU_VERSIONS
  return cpu_isa() == CpuIsa::kV4 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace pypkg
