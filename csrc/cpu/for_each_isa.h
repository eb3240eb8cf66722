// Includes RTSVM_STEPS once for each instruction set, in the namespaces v4, v3 and v1, with RTSVM_LANES doubles in a
// vector. Without a guard; after isa.h, within the namespace of the caller.

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#endif

#if defined(RTSVM_SEVERAL_ISAS)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#define RTSVM_LANES 8
#include RTSVM_STEPS
#undef RTSVM_LANES
}  // namespace v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define RTSVM_LANES 4
#include RTSVM_STEPS
#undef RTSVM_LANES
}  // namespace v3
#pragma GCC pop_options
#endif
namespace v1 {
#define RTSVM_LANES 2
#include RTSVM_STEPS
#undef RTSVM_LANES
}  // namespace v1
