// The instruction sets that every kernel file is compiled for, and the choice among them.
//
// A kernel file is compiled once for each of them with -DFF_CAPABILITY=<namespace>, and puts all
// it defines into `namespace fastfusion::FF_CAPABILITY`. Its header declares the entry points for
// all of them:
//
//   FF_DECLARE(void haar_split2d(Type type, const Image& x, const Image& low, const Image& high))
//
// and the binding calls the chosen one:
//
//   FF_CALL(haar_split2d)(type, x, low, high);
#pragma once

namespace fastfusion {

// The last runs the code of kAvx512, which asks `bfloat16_instructions`.
enum class Capability { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best that this CPU can run, or the lower one that FASTFUSION_CPU_CAPABILITY names.
Capability capability();

// Whether AVX-512's conversion to bfloat16 may be used; known once `capability` has been called.
inline bool bfloat16_instructions = false;

}  // namespace fastfusion

#if defined(__x86_64__)
#define FF_DECLARE(...)  \
  namespace fastfusion { \
  namespace baseline {   \
  __VA_ARGS__;           \
  }                      \
  namespace avx2 {       \
  __VA_ARGS__;           \
  }                      \
  namespace avx512 {     \
  __VA_ARGS__;           \
  }                      \
  }
#define FF_CALL(function)                                          \
  (::fastfusion::capability() >= ::fastfusion::Capability::kAvx512 \
       ? ::fastfusion::avx512::function                            \
   : ::fastfusion::capability() == ::fastfusion::Capability::kAvx2 \
       ? ::fastfusion::avx2::function                              \
       : ::fastfusion::baseline::function)
#else
#define FF_DECLARE(...)  \
  namespace fastfusion { \
  namespace baseline {   \
  __VA_ARGS__;           \
  }                      \
  }
#define FF_CALL(function) (::fastfusion::baseline::function)
#endif
