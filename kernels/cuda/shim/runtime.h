// What the parts of the shim's runtime know of each other.
#pragma once

#include "shim.h"

namespace shim {

// Of every float type a NaN.
constexpr unsigned char POISON = 0xff;

// The running thread's number in its block, and how many there are.
uint32_t thread();
uint32_t threads();
// Whether threads take their turns from the last to the first.
bool is_reverse();
unsigned char *shared_memory();
// Bytes of dynamic shared memory.
size_t dynamic_bytes();

// The running thread goes on when the counter has another value.
void wait_while(const uint32_t *counter, uint32_t value);

// At a block's start; at its end, where nothing may be left under way; and where no thread can go on: whether one can now.
void hopper_begin();
void hopper_end();
bool hopper_advance();

} // namespace shim
