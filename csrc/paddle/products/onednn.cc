#include "products/onednn.h"

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// The part of the C interface of oneDNN 3 (oneapi/dnnl/dnnl.h) that is used below. Paddle's wheels
// have the library, but not that header.
namespace pypkg {
namespace {

constexpr const char* kLibrary = "libdnnl.so.3";
constexpr int kSuccess = 0, kCpu = 1, kInOrder = 1, kBfloat16 = 2, kFloat32 = 3;
constexpr int kSource = 1, kDestination = 17, kWeights = 33;          // arguments of a primitive
void* const kAllocate = reinterpret_cast<void*>(~std::uintptr_t{0});  // memory by the library

struct Argument {
  int position;
  void* memory;
};

// Calls a function of the library. It is not linked, so that Paddle without oneDNN can be used.
template <class... Arguments>
void call(const char* name, Arguments... arguments) {
  static void* const library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library ? dlsym(library, name) : nullptr;
  if (!found) {
    throw std::runtime_error(std::string(name) + " is missing: Paddle has not loaded " + kLibrary);
  }
  const int status = reinterpret_cast<int (*)(Arguments...)>(found)(arguments...);
  if (status == kSuccess) return;
  throw std::runtime_error(std::string(name) + " failed with status " + std::to_string(status));
}

// An object of the library: made by `make`, whose first argument receives it, released by
// `destroy`.
class Object {
 public:
  template <class... Arguments>
  Object(const char* make, const char* destroy, Arguments... arguments) : destroy_(destroy) {
    call(make, &object_, arguments...);
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { call(destroy_, object_); }
  void* get() const { return object_; }

 private:
  void* object_ = nullptr;
  const char* destroy_;
};

void* engine() {
  // Never released: at the end of the process other threads may still multiply.
  static const Object& cpu =
      *new Object("dnnl_engine_create", "dnnl_engine_destroy", kCpu, size_t{0});
  return cpu.get();
}

void* stream() {
  thread_local const Object own("dnnl_stream_create", "dnnl_stream_destroy", engine(), kInOrder);
  return own.get();
}

// The layout of a float32 matrix, and the same layout of bfloat16 elements.
class Layout {
 public:
  explicit Layout(const MatmulOperand& matrix)
      : sizes_{matrix.rows, matrix.columns},
        strides_{matrix.row_stride, matrix.column_stride},
        given_("dnnl_memory_desc_create_with_strides", "dnnl_memory_desc_destroy", 2, sizes_ + 0,
               kFloat32, strides_ + 0),
        bfloat16_("dnnl_memory_desc_create_with_strides", "dnnl_memory_desc_destroy", 2, sizes_ + 0,
                  kBfloat16, strides_ + 0) {}
  void* given() const { return given_.get(); }
  void* bfloat16() const { return bfloat16_.get(); }

 private:
  const int64_t sizes_[2], strides_[2];
  const Object given_, bfloat16_;
};

Object memory(void* layout, void* data) {
  return Object("dnnl_memory_create", "dnnl_memory_destroy", layout, engine(), data);
}

template <size_t kCount>
void run(const Object& plan, const Argument (&arguments)[kCount]) {
  // oneDNN keeps what it has compiled for the sizes of earlier calls.
  const Object primitive("dnnl_primitive_create", "dnnl_primitive_destroy", plan.get());
  call("dnnl_primitive_execute", primitive.get(), stream(), static_cast<int>(kCount),
       arguments + 0);
}

// A matrix rounded to bfloat16.
class Rounded {
 public:
  Rounded(const MatmulOperand& matrix, const Layout& layout)
      : memory_(memory(layout.bfloat16(), kAllocate)) {
    const Object given = memory(layout.given(), const_cast<float*>(matrix.data));
    const Object plan("dnnl_reorder_primitive_desc_create", "dnnl_primitive_desc_destroy",
                      layout.given(), engine(), layout.bfloat16(), engine(),
                      static_cast<void*>(nullptr));
    run(plan, {{kSource, given.get()}, {kDestination, memory_.get()}});
  }
  void* get() const { return memory_.get(); }

 private:
  const Object memory_;
};

}  // namespace

void onednn_matmul_bfloat16(const MatmulOperand& a, const MatmulOperand& b, float* c) {
  const Layout of_a(a), of_b(b), of_c({c, a.rows, b.columns, b.columns, 1});
  const Object product("dnnl_matmul_primitive_desc_create", "dnnl_primitive_desc_destroy", engine(),
                       of_a.bfloat16(), of_b.bfloat16(), static_cast<void*>(nullptr), of_c.given(),
                       static_cast<void*>(nullptr));
  const Rounded left(a, of_a);
  const Rounded right(b, of_b);
  const Object result = memory(of_c.given(), c);
  run(product, {{kSource, left.get()}, {kWeights, right.get()}, {kDestination, result.get()}});
  call("dnnl_stream_wait", stream());
}

}  // namespace pypkg
