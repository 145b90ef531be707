// Numbers below the smallest normal one count as zero while this object lives, in the thread that made it. The tail of a
// softmax and of its squared gradient is full of them, and a processor takes a hundred cycles for each: a fifth of a
// guidance step's update at peaked logits.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace entrgi {

class FlushDenormals {
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zeros
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | 1ul << 24));  // FZ
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  unsigned long saved_;
#else
  FlushDenormals() = default;
  ~FlushDenormals() {}
#endif
};

}  // namespace entrgi
