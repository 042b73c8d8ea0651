// What the shim's barriers and copies know of its products.
#pragma once

namespace shim {

// Where a block's dynamic shared memory begins: as on a device, not where a swizzle's pattern does.
constexpr unsigned DYNAMIC_AT = 128;

void products_begin_block();
void products_end_block();
// Whether a warp that waits can go on now.
bool products_advance();

} // namespace shim
