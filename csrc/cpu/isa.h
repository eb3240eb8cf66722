// One source, several instruction sets: the loader picks the best version of a marked function.
#pragma once

// Only GCC on x86-64 Linux supports this form; elsewhere there is one version, for what every processor of the kind has
// (on 64-bit ARM, NEON). Marked functions must not contain OpenMP regions and must not be
// templates. The functions that they call must be inlined, so these are RTSVM_INLINE.
#if !defined(RTSVM_ISA_CLONES) && defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && \
    defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define RTSVM_ISA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef RTSVM_ISA_CLONES
#define RTSVM_ISA_CLONES
#endif

// Whether a source may be included several times, once for each instruction set, with vectors of its width.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(RTSVM_ONE_ISA)
#define RTSVM_SEVERAL_ISAS 1
#endif

#if defined(__GNUC__)
#define RTSVM_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define RTSVM_INLINE __forceinline
#else
#define RTSVM_INLINE inline
#endif
