// random_normal as a Python function.
#include "random_normal/random_normal.h"

#include "arguments.h"
#include "kernels.h"

namespace py = pybind11;
using py::arg;

namespace pypkg {

void bind_random_normal(py::module_& m) {
  m.def(
      "random_normal",
      [](py::object out, uint64_t key, uint64_t stream_id, float deviation, int64_t first,
         int64_t offset, int64_t rows, int64_t cols, int64_t out_stride, int64_t index_stride,
         std::intptr_t stream) {
        Arguments args("random_normal", stream);
        RandomNormal p;
        p.out = args.required("out", out, "T", {"elements"});
        p.dtype = args.dtype("T");
        const int64_t last = offset + (rows - 1) * out_stride + cols;
        args.check(offset >= 0 && first >= 0 && rows >= 0 && cols >= 0 && index_stride >= 0 &&
                       (rows <= 1 || out_stride >= cols) && (rows == 0 || last <= args["elements"]),
                   "rows " + std::to_string(rows) + ", cols " + std::to_string(cols) +
                       ", out_stride " + std::to_string(out_stride) + ", index_stride " +
                       std::to_string(index_stride) + ", first " + std::to_string(first) +
                       " and offset " + std::to_string(offset) +
                       " must not be negative, and rows " + "must lie apart and within the " +
                       std::to_string(args["elements"]) + " elements of out");
        p.out = static_cast<char*>(p.out) + offset * dtype_size(p.dtype);
        p.rows = rows;
        p.cols = cols;
        p.out_stride = out_stride;
        p.first = first;
        p.index_stride = index_stride;
        p.key = key;
        p.stream = stream_id;
        p.deviation = deviation;
        args.run(p, PYPKG_KERNEL(random_normal));
      },
      "out[offset + r * out_stride + c] = deviation * z(first + r * index_stride + c) for rows and "
      "cols; z is normal and depends on its index, key and stream_id alone. out: a vector.",
      arg("out"), py::kw_only(), arg("key"), arg("stream_id"), arg("deviation") = 1.0f,
      arg("first") = 0, arg("offset") = 0, arg("rows") = 1, arg("cols"), arg("out_stride") = 0,
      arg("index_stride") = 0, arg("stream") = 0);
}

}  // namespace pypkg
