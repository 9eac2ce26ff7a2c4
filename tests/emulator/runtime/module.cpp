// The Python module of the runtime: settings and the launches' counters.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../include/emulator.h"
#include "counters.h"
#include "device.h"
#include "host.h"
#include "source_locations.h"
#include "trace.h"

namespace py = pybind11;
using namespace segattn::emulator;

namespace {

py::tuple as_tuple(const dim3& size) {
  return py::make_tuple(size.x, size.y, size.z);
}

py::dict as_dict(const InstructionCounters& counted) {
  py::dict result;
  result["instructions"] = counted.instructions;
  result["bytes"] = counted.bytes;
  result["sectors"] = counted.sectors;
  result["wavefronts"] = counted.wavefronts;
  result["ideal_wavefronts"] = counted.ideal_wavefronts;
  return result;
}

// FLOPs of one mma: 2 m n k.
constexpr int64_t kMmaFlops[] = {2 * 16 * 8 * 16, 2 * 16 * 8 * 16, 2 * 16 * 8 * 8};
constexpr const char* kMmaNames[] = {"float16", "bfloat16", "tf32"};

py::dict as_dict(const LaunchCounters& launch) {
  py::dict result, mma, memory;
  result["kernel"] = launch.kernel;
  result["grid"] = as_tuple(launch.grid_size);
  result["block"] = as_tuple(launch.block_size);
  result["cluster"] = launch.cluster_size;
  result["arguments"] = py::bytes(launch.arguments);
  result["dynamic_shared_bytes"] = launch.dynamic_shared_bytes;
  result["static_shared_bytes"] = launch.static_shared_bytes;
  result["architecture"] = launch.architecture;
  result["stream"] = launch.stream;
  result["seconds"] = launch.seconds;
  result["block_barriers"] = launch.block_barriers;
  result["warp_barriers"] = launch.warp_barriers;
  result["shuffles"] = launch.shuffles;
  result["async_copies"] = launch.async_copies;
  result["bulk_copy_bytes"] = launch.bulk_copy_bytes;
  result["bulk_delivered_bytes"] = launch.bulk_delivered_bytes;
  result["mbarrier_waits"] = launch.mbarrier_waits;
  result["fma_flops"] = 2 * launch.fma_operations;
  int64_t mma_flops = 0;
  for (int i = 0; i < 3; ++i) {
    mma[kMmaNames[i]] = launch.mma_instructions[i] * kMmaFlops[i];
    mma_flops += launch.mma_instructions[i] * kMmaFlops[i];
  }
  result["mma_flops"] = mma_flops;
  result["mma_flops_by_type"] = mma;
  py::dict wgmma;
  for (int i = 0; i < 2; ++i)
    wgmma[kMmaNames[i]] = 2 * launch.wgmma_operations[i];
  result["wgmma_flops"] = 2 * (launch.wgmma_operations[0] + launch.wgmma_operations[1]);
  result["wgmma_flops_by_type"] = wgmma;
  result["wgmma_shared_a_bytes"] = launch.wgmma_a_bytes;
  result["wgmma_shared_b_bytes"] = launch.wgmma_b_bytes;
  if (kTrace) {
    for (const auto& [kind, counted] : launch.memory)
      memory[kind.c_str()] = as_dict(counted);
    py::list locations;
    for (const auto& [kind_and_location, counted] : launch.locations) {
      py::dict entry = as_dict(counted);
      entry["kind"] = kind_and_location.first;
      entry["location"] = describe_location(kind_and_location.second);
      locations.append(entry);
    }
    result["memory"] = memory;
    result["locations"] = locations;
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Control of the CUDA emulator (tests/emulator).";
  m.attr("traced") = kTrace;
  m.def(
      "reset",
      [] {
        forget_launches();
        forget_calls();
      },
      "Forgets the launches and calls reported so far.");
  m.def(
      "report",
      [] {
        py::list result;
        for (const LaunchCounters& launch : finished_launches())
          result.append(as_dict(launch));
        return result;
      },
      "One dictionary a launch since reset(), oldest first.");
  m.def("calls", &calls, "How often host code called each function of the runtime API since reset().");
  m.def(
      "set_failing_launch", &set_failing_launch, py::arg("launches"),
      "One launch fails with a lack of resources after so many have succeeded; negative: none.");
  m.def(
      "set_failing_call", &set_failing_call, py::arg("calls"),
      "One call of the runtime API or of cuTensorMapEncodeTiled fails after so many more; negative: none.");
  m.def("pending_error", &pending_error, "The error that cudaGetLastError would return; empty for none.");
  m.def(
      "set_current_stream",
      [](int64_t stream) {
        if (stream == 0)
          throw py::value_error("0 is the default stream, which a launch must not fall back to");
        set_current_stream(stream);
      },
      py::arg("stream"), "The number of PyTorch's current stream, as report() shows it for each launch; 1 at first.");
  m.def(
      "set_blocks_at_ends", &set_blocks_at_ends, py::arg("blocks"),
      "Runs only so many first and last blocks of every launch; 0: none; negative: all.");
  m.def(
      "set_built_architectures", &set_built_architectures, py::arg("architectures"),
      "Architectures the library reports as built for, 80 for sm_80; empty: that of the emulated device.");
  m.def(
      "set_built_for_sm90a", &set_built_for_sm90a, py::arg("built"),
      "Whether a library built for sm_90 counts as having code for sm_90a; at first it does.");
  m.def("set_seed", &set_seed, py::arg("seed"), "Chooses the schedule of threads and blocks.");
  m.def(
      "set_mma_rounding", &set_mma_rounding, py::arg("rounding"),
      "How mma adds: 'truncate', as tensor cores do, or 'nearest'. ValueError for anything else.");
  m.def("mma_rounding", [] { return mma_rounding() == MmaRounding::kTruncate ? "truncate" : "nearest"; });
  m.def(
      "set_device",
      [](int architecture, int multiprocessors) {
        set_device(architecture, multiprocessors);
        reset_function_attributes();
      },
      py::arg("architecture"), py::arg("multiprocessors") = 0,
      "Chooses the emulated architecture, 80 for sm_80. ValueError for an unknown one.");
}
