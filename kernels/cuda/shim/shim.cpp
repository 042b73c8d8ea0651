// The shim's runtime: fibers and their turns, shared memory, asynchronous copies, faults.

#include "products.h"
#include "runtime.h"

#include <memory>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace shim {

constexpr size_t STACK_BYTES = 128 * 1024, SHARED_BYTES = 256 * 1024, RED_ZONE = 64;
constexpr size_t DYNAMIC_BYTES_MAX = 227 * 1024; // What a block may have on sm_90.

struct Copy {
    unsigned char *to;
    const unsigned char *from;
    bool valid;
};

struct Warp {
    uint32_t arrived, generation;
    Meeting kind;
    Slot slots[2][32];
};

struct Fiber {
    ucontext_t context;
    void *stack_pointer;
    Dim3 thread;
    uint32_t linear;
    bool done;
    // Has said that the next launch may begin, and has waited for those before.
    bool released, turn;
    // Waits while the counter has this value.
    const uint32_t *counter;
    uint32_t value;
    std::vector<std::vector<Copy>> copies;
};

struct SharedRange {
    const void *tag;
    size_t at, bytes;
};

struct Launch {
    const Entry *entry;
    const void *params;
    uint32_t threads;
    // It may have begun while the launch before it ended.
    bool early;
    size_t dynamic_bytes;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    uint32_t arrived, generation;
    std::vector<SharedRange> ranges;
    size_t shared_end;
    bool failed, reverse;
    char message[512];
};

thread_local Fiber *current = nullptr;
thread_local Dim3 thread_index, block_index, block_size, grid_size;
thread_local uint32_t planted = 0;
static thread_local Launch *launch = nullptr;
static thread_local Fiber scheduler;

// Memory of one host thread, kept from launch to launch.
struct Arena {
    unsigned char *memory;
    size_t bytes;
    explicit Arena(size_t bytes) : memory(nullptr), bytes(bytes) {
        void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        memory = at == MAP_FAILED ? nullptr : static_cast<unsigned char *>(at);
    }
    Arena(const Arena &) = delete;
    Arena &operator=(const Arena &) = delete;
    ~Arena() { munmap(memory, bytes); }
};

static Arena &stacks() {
    static thread_local Arena arena(1024 * STACK_BYTES);
    return arena;
}

unsigned char *shared_memory() {
    static thread_local Arena arena(SHARED_BYTES);
    return arena.memory;
}

static const Entry *entries = nullptr;

Entry::Entry(const char *name, const char *params_name, size_t params_bytes, uint32_t threads_max,
             void (*run)(const void *))
    : name(name), params_name(params_name), params_bytes(params_bytes), threads_max(threads_max), run(run),
      next(entries) {
    entries = this;
}

static const Entry *find(const char *name) {
    const Entry *entry = entries;
    while (entry && strcmp(entry->name, name) != 0) {
        entry = entry->next;
    }
    return entry;
}

#if defined(__x86_64__)
// Saves what a call must keep, and goes on where the other stack was left: ucontext's version asks the kernel each time.
asm(R"(
.text
.globl kvern_shim_switch
.type kvern_shim_switch, @function
kvern_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void kvern_shim_switch(void **save, void *restore);

static void start(Fiber &fiber, unsigned char *stack, void (*entry)()) {
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(entry);
    fiber.stack_pointer = top - 6;
}

static void go(Fiber &from, Fiber &to) { kvern_shim_switch(&from.stack_pointer, to.stack_pointer); }
#else
static void start(Fiber &fiber, unsigned char *stack, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, entry, 0);
}

static void go(Fiber &from, Fiber &to) { swapcontext(&from.context, &to.context); }
#endif

void wait_while(const uint32_t *counter, uint32_t value) {
    Fiber &own = *current;
    own.counter = counter;
    own.value = value;
    go(own, scheduler);
}

void fault(const char *format, ...) {
    char text[320];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    snprintf(launch->message, sizeof(launch->message), "%s, block %u %u %u, thread %u: %s", launch->entry->name,
             block_index.x, block_index.y, block_index.z, current ? current->linear : 0, text);
    launch->failed = true;
    for (;;) {
        go(*current, scheduler);
    }
}

void block_barrier() {
    uint32_t generation = launch->generation;
    if (++launch->arrived == launch->threads) {
        launch->arrived = 0;
        ++launch->generation;
    } else {
        wait_while(&launch->generation, generation);
    }
}

uint32_t lane() { return current->linear % 32; }
uint32_t thread() { return current->linear; }
uint32_t threads() { return launch->threads; }
bool is_reverse() { return launch->reverse; }
size_t dynamic_bytes() { return launch->dynamic_bytes; }

void grid_launch_dependents() { current->released = true; }
void grid_dependency_wait() { current->turn = true; }

void check_turn() {
    if (launch->early && !current->turn) {
        fault("expected a wait for the launches before, found none before an access to memory");
    }
}

Slot *meet(Meeting kind, const void *value, size_t bytes, void (*last)(Slot *)) {
    Warp &warp = launch->warps[current->linear / 32];
    uint32_t generation = warp.generation;
    Slot *slots = warp.slots[generation % 2];
    if (warp.arrived != 0 && warp.kind != kind) {
        fault("lanes of a warp meet in different operations");
    }
    warp.kind = kind;
    memcpy(slots[lane()].bytes, value, value ? bytes : 0);
    if (++warp.arrived == 32) {
        if (last) {
            last(slots);
        }
        warp.arrived = 0;
        ++warp.generation;
    } else {
        wait_while(&warp.generation, generation);
    }
    return slots;
}

unsigned char *dynamic_shared() { return shared_memory() + DYNAMIC_AT; }

void *shared(const void *tag, size_t bytes) {
    for (const SharedRange &range : launch->ranges) {
        if (range.tag == tag) {
            return shared_memory() + range.at;
        }
    }
    size_t at = launch->shared_end;
    launch->shared_end = at + (bytes + 15) / 16 * 16 + RED_ZONE;
    if (launch->shared_end > SHARED_BYTES) {
        fault("more than %zu bytes of shared memory", SHARED_BYTES);
    }
    launch->ranges.push_back({tag, at, bytes});
    return shared_memory() + at;
}

// Every byte of shared memory that belongs to nothing is still poison.
static void check_red_zones() {
    size_t end = 0;
    auto check = [](size_t from, size_t to) {
        for (size_t i = from; i < to; ++i) {
            if (shared_memory()[i] != POISON) {
                fault("a write %zu bytes into shared memory that belongs to nothing", i);
            }
        }
    };
    check(0, DYNAMIC_AT);
    end = DYNAMIC_AT + launch->dynamic_bytes;
    for (const SharedRange &range : launch->ranges) {
        check(end, range.at);
        end = range.at + range.bytes;
    }
    check(end, launch->shared_end);
}

// A copy takes place as late as it may, at the wait; until then its destination is poison.
void copy_async(void *to, const void *from, bool valid) {
    auto &copies = current->copies;
    if (copies.empty()) {
        copies.emplace_back();
    }
    memset(to, POISON, 16);
    copies.back().push_back({static_cast<unsigned char *>(to), static_cast<const unsigned char *>(from), valid});
}

void copy_async_commit() {
    auto &copies = current->copies;
    if (copies.empty()) {
        copies.emplace_back();
    }
    copies.emplace_back();
}

void copy_async_wait(int pending) {
    auto &copies = current->copies;
    // The last group is not committed yet.
    while (copies.size() > static_cast<size_t>(pending) + 1) {
        for (const Copy &copy : copies.front()) {
            if (copy.valid) {
                memcpy(copy.to, copy.from, 16);
            } else {
                memset(copy.to, 0, 16);
            }
        }
        copies.erase(copies.begin());
    }
}

static void run_thread() {
    launch->entry->run(launch->params);
    if (launch->early && !(current->turn && current->released)) {
        fault("expected a wait for the launches before, and word to the next, found %s",
              current->turn ? "no word" : "no wait");
    }
    current->done = true;
    go(*current, scheduler);
}

// Gives fibers their turns until all are done; a round in which none can move is a deadlock.
static void run_block(bool reverse) {
    Launch &own = *launch;
    own.arrived = 0;
    own.ranges.clear();
    own.shared_end = DYNAMIC_AT + (own.dynamic_bytes + 127) / 128 * 128 + RED_ZONE;
    memset(shared_memory(), POISON, SHARED_BYTES);
    hopper_begin();
    for (Warp &warp : own.warps) {
        warp.arrived = 0;
    }
    for (uint32_t i = 0; i < own.threads; ++i) {
        Fiber &fiber = own.fibers[i];
        fiber.linear = i;
        fiber.thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        fiber.done = fiber.released = fiber.turn = false;
        fiber.counter = nullptr;
        fiber.copies.clear();
        start(fiber, stacks().memory + i * STACK_BYTES, run_thread);
    }
    for (uint32_t left = own.threads; left > 0;) {
        bool moved = false;
        for (uint32_t i = 0; i < own.threads; ++i) {
            Fiber &fiber = own.fibers[reverse ? own.threads - 1 - i : i];
            if (fiber.done || (fiber.counter && *fiber.counter == fiber.value)) {
                continue;
            }
            fiber.counter = nullptr;
            moved = true;
            current = &fiber;
            thread_index = fiber.thread;
            go(scheduler, fiber);
            if (own.failed) {
                return;
            }
            left -= fiber.done;
        }
        if (!moved && !hopper_advance()) {
            snprintf(own.message, sizeof(own.message), "%s, block %u %u %u: a deadlock, %u threads wait",
                     own.entry->name, block_index.x, block_index.y, block_index.z, left);
            own.failed = true;
            return;
        }
    }
    // As a fiber that can be left, because a fault leaves it.
    Fiber &fiber = own.fibers[0];
    current = &fiber;
    start(fiber, stacks().memory, [] {
        check_red_zones();
        hopper_end();
        go(*current, scheduler);
    });
    go(scheduler, fiber);
}

static struct sigaction previous_segv, previous_bus;

// A fault of memory within a kernel ends its launch; any other goes to who was there before.
static void on_signal(int number, siginfo_t *info, void *) {
    if (launch && current && !launch->failed) {
        fault("an access outside of any buffer, at %p", info->si_addr);
    }
    sigaction(number, number == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
}

static void watch_memory() {
    static const bool installed = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGSEGV, &action, &previous_segv);
        sigaction(SIGBUS, &action, &previous_bus);
        return true;
    }();
    static_cast<void>(installed);
}

} // namespace shim

// What a kernel takes.
struct KernelLimits {
    const char *params_name;
    size_t params_bytes;
    uint32_t threads_max;
};

// 0, or 1 where there is no such kernel.
extern "C" int kvern_shim_limits(const char *name, KernelLimits *limits) {
    const shim::Entry *entry = shim::find(name);
    if (!entry) {
        return 1;
    }
    *limits = {entry->params_name, entry->params_bytes, entry->threads_max};
    return 0;
}

struct LaunchShape {
    Dim3 grid, block;
    uint32_t shared_bytes, reverse, planted, early;
};

// 0, or 1 with what went wrong in `message`.
extern "C" int kvern_shim_launch(const char *name, const LaunchShape *shape, const void *params, size_t params_bytes,
                                 char *message, size_t message_bytes) {
    using namespace shim;
    const Entry *entry = find(name);
    uint32_t threads = shape->block.x * shape->block.y * shape->block.z;
    if (!entry || entry->params_bytes != params_bytes || threads == 0 || threads % 32 != 0 ||
        threads > entry->threads_max || shape->shared_bytes > DYNAMIC_BYTES_MAX) {
        snprintf(message, message_bytes, "%s: %zu bytes of parameters, %u threads, %u bytes of shared memory: %s", name,
                 params_bytes, threads, shape->shared_bytes, entry ? "not what it takes" : "no such kernel");
        return 1;
    }
    watch_memory();
    auto own = std::make_unique<Launch>();
    own->entry = entry;
    own->params = params;
    own->threads = threads;
    own->early = shape->early != 0;
    own->dynamic_bytes = shape->shared_bytes;
    own->reverse = shape->reverse != 0;
    own->fibers.resize(threads);
    own->warps.resize(threads / 32);
    launch = own.get();
    block_size = shape->block;
    grid_size = shape->grid;
    planted = shape->planted;
    uint64_t blocks = static_cast<uint64_t>(shape->grid.x) * shape->grid.y * shape->grid.z;
    for (uint64_t i = 0; i < blocks && !own->failed; ++i) {
        uint64_t block = shape->reverse ? blocks - 1 - i : i;
        block_index = {static_cast<uint32_t>(block % shape->grid.x),
                       static_cast<uint32_t>(block / shape->grid.x % shape->grid.y),
                       static_cast<uint32_t>(block / shape->grid.x / shape->grid.y)};
        run_block(own->reverse);
    }
    snprintf(message, message_bytes, "%s", own->message);
    launch = nullptr;
    current = nullptr;
    return own->failed ? 1 : 0;
}

// The names of all kernels, one after another.
extern "C" const char *kvern_shim_kernel(size_t index) {
    const shim::Entry *entry = shim::entries;
    while (entry && index-- > 0) {
        entry = entry->next;
    }
    return entry ? entry->name : nullptr;
}
