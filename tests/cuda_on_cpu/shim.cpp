// What a torch with CUDA brings and one without does not: test only.
#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
