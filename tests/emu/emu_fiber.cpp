/* emu_fiber: see emu_fiber.h. A fiber is entered once through makecontext; after that setjmp and
 * longjmp switch, which unlike swapcontext need no system call. AddressSanitizer has to be told of
 * every switch; its own longjmp would forget what it knows of the stack, the compiler's does not.
 */
#include "tests/emu/emu_fiber.h"
#include "tests/emu/emu_runtime.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <ucontext.h>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#else
#define ASAN 0
#endif

namespace
{

constexpr size_t STACK = 256 * 1024, GUARD = 64, MAX_THREADS = 1024;
constexpr unsigned char GUARD_BYTE = 0xA7;

#if ASAN
typedef void *jump_buffer[5];
#define SET_JUMP(buffer) __builtin_setjmp(buffer)
#define JUMP(buffer)     __builtin_longjmp(buffer, 1)
#else
typedef jmp_buf jump_buffer;
#define SET_JUMP(buffer) _setjmp(buffer)
#define JUMP(buffer)     _longjmp(buffer, 1)
#endif

enum waiting { RUNS, AT_BARRIER, IN_WARP, DONE };

struct copy {
    void *to;
    const void *from;
    size_t bytes;
    bool there;
};

struct fiber {
    emu_thread at;
    waiting wait;
    bool entered;
    unsigned generation; /* of its warp, when it began to wait */
    ucontext_t context;
    jump_buffer jump;
    void *fake_stack;
    char *stack;
    std::vector<copy> open;                /* asynchronous copies, not yet a group */
    std::vector<std::vector<copy>> groups; /* under way, oldest first */
};

struct warp {
    int arrived;
    emu_together what;
    size_t bytes;
    unsigned generation;
    unsigned char in[32 * EMU_LANE_BYTES], out[32 * EMU_LANE_BYTES];
};

struct machine {
    ~machine()
    {
        for (fiber &f : fibers)
            std::free(f.stack);
    }
    std::vector<fiber> fibers;
    std::vector<warp> warps;
    std::vector<int> order;
    fiber *self;
    jump_buffer scheduler;
    const void *scheduler_stack;
    size_t scheduler_stack_size;
    const emu_launch *how;
    const std::function<void()> *body;
    unsigned char *smem;
} m;

[[noreturn]] void die(const char *what)
{
    std::fprintf(stderr, "emulated kernel %s", m.how ? m.how->name : "?");
    if (m.self) {
        const emu_thread &t = m.self->at;
        std::fprintf(stderr, ", block (%u, %u, %u), thread %u", t.block.x, t.block.y, t.block.z,
                     t.thread.x);
    }
    std::fprintf(stderr, ": %s\n", what);
    std::abort();
}

/* ---- switching ---- */

[[gnu::noinline]] void jump_to_scheduler(fiber *f)
{
    if (SET_JUMP(f->jump) == 0)
        JUMP(m.scheduler);
}

void to_scheduler()
{
#if ASAN
    fiber *f = m.self;
    __sanitizer_start_switch_fiber(&f->fake_stack, m.scheduler_stack, m.scheduler_stack_size);
    jump_to_scheduler(f);
    __sanitizer_finish_switch_fiber(f->fake_stack, nullptr, nullptr);
#else
    jump_to_scheduler(m.self);
#endif
}

void enter()
{
#if ASAN
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
    for (;;) { /* one round a block: entering takes system calls */
        (*m.body)();
        m.self->wait = DONE;
        to_scheduler();
    }
}

void prepare(fiber *f)
{
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, enter, 0);
    f->entered = true;
}

[[gnu::noinline]] void jump_to(fiber *f, bool first)
{
    if (SET_JUMP(m.scheduler) != 0)
        return;
    if (first)
        setcontext(&f->context);
    JUMP(f->jump);
}

/* Runs a fiber until it waits. */
void resume(fiber *f)
{
    m.self = f;
    const bool first = !f->entered;
    if (first)
        prepare(f);
#if ASAN
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f->stack, STACK);
    jump_to(f, first);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    jump_to(f, first);
#endif
    m.self = nullptr;
}

/* ---- a block ---- */

void begin_block(const emu_launch &how, dim3 block)
{
    const size_t n = how.block.x;
    m.fibers.reserve(MAX_THREADS); /* a fiber that has been entered does not move */
    while (m.fibers.size() < n) {
        m.fibers.emplace_back();
        m.fibers.back().stack = static_cast<char *>(std::malloc(STACK));
    }
    m.warps.assign(n / 32, warp{});
    m.order.resize(n);
    for (size_t i = 0; i < n; i++) {
        fiber &f = m.fibers[i];
        f.at = {dim3((unsigned)i, 0, 0), block, how.block, how.grid};
        f.wait = RUNS;
        f.open.clear();
        f.groups.clear();
        m.order[i] = (int)i;
    }
    std::memset(m.smem, 0xff, how.smem);
    if (!ASAN)
        std::memset(m.smem + how.smem, GUARD_BYTE, GUARD);
}

void end_block(const emu_launch &how)
{
    for (const warp &w : m.warps)
        if (w.arrived)
            die("the lanes of a warp do not all come to a warp operation");
    for (size_t i = 0; !ASAN && i < GUARD; i++)
        if (m.smem[how.smem + i] != GUARD_BYTE)
            die("writes beyond its shared memory");
}

bool can_run(const fiber &f)
{
    if (f.wait == IN_WARP)
        return m.warps[f.at.thread.x / 32].generation != f.generation;
    return f.wait == RUNS;
}

void run_block(const emu_launch &how, dim3 block)
{
    const int n = (int)how.block.x;
    begin_block(how, block);
    /* Some warps lag behind: in every other round others, or the same ones until all the others
     * wait for them. */
    const bool long_lag = emu_random()() % 2;
    unsigned lag = 0;
    int round = 0;
    for (int left = n; left > 0; round++) {
        std::shuffle(m.order.begin(), m.order.end(), emu_random());
        if (!long_lag || lag == 0)
            lag = round % 2 ? (unsigned)emu_random()() : 0;
        int ran = 0, at_barrier = 0;
        for (int i : m.order) {
            fiber &f = m.fibers[(size_t)i];
            if (!can_run(f) || (lag >> i / 32 & 1))
                continue;
            ran++;
            resume(&f);
            left -= f.wait == DONE;
        }
        for (int i = 0; i < n; i++)
            at_barrier += m.fibers[(size_t)i].wait == AT_BARRIER;
        if (at_barrier == n)
            for (int i = 0; i < n; i++)
                m.fibers[(size_t)i].wait = RUNS;
        else if (ran == 0 && lag != 0)
            lag = 0;
        else if (ran == 0 && left > 0)
            die(at_barrier ? "not all threads of the block reach a barrier"
                           : "the lanes of a warp do not all come to a warp operation");
    }
    end_block(how);
}

std::map<const void *, size_t> &allowed()
{
    static std::map<const void *, size_t> bytes;
    return bytes;
}

} // namespace

/* ---- what kernels call ---- */

const emu_thread *emu_self()
{
    return &m.self->at;
}

unsigned char *emu_smem()
{
    return m.smem;
}

void emu_barrier()
{
    m.self->wait = AT_BARRIER;
    to_scheduler();
}

void emu_want_aligned(const void *p, size_t bytes)
{
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
        die("an address is not aligned");
}

const unsigned char *emu_warp(emu_together what, const void *mine, size_t bytes)
{
    warp &w = m.warps[m.self->at.thread.x / 32];
    const size_t lane = m.self->at.thread.x % 32;
    if (bytes > EMU_LANE_BYTES)
        die("a lane gives too many bytes");
    if (w.arrived == 0)
        w.what = what, w.bytes = bytes;
    else if (w.what != what || w.bytes != bytes)
        die("the lanes of a warp are in different operations");
    std::memcpy(w.in + lane * EMU_LANE_BYTES, mine, bytes);
    if (++w.arrived == 32) {
        std::memcpy(w.out, w.in, sizeof w.out);
        w.arrived = 0;
        w.generation++;
        return w.out;
    }
    m.self->generation = w.generation;
    m.self->wait = IN_WARP;
    to_scheduler();
    m.self->wait = RUNS;
    return w.out;
}

void emu_async_copy(void *smem, const void *src, size_t bytes, bool there)
{
    emu_want_aligned(smem, bytes);
    if (there)
        emu_want_aligned(src, bytes);
    std::memset(smem, 0xff, bytes); /* what was there is lost at once, what comes is there later */
    m.self->open.push_back({smem, src, bytes, there});
}

void emu_async_commit()
{
    m.self->groups.push_back(std::move(m.self->open));
    m.self->open.clear();
}

/* As late as the contract allows. */
void emu_async_wait(int under_way)
{
    auto &groups = m.self->groups;
    while ((int)groups.size() > under_way) {
        for (const copy &c : groups.front())
            if (c.there)
                std::memcpy(c.to, c.from, c.bytes);
            else
                std::memset(c.to, 0, c.bytes);
        groups.erase(groups.begin());
    }
}

/* ---- launches ---- */

cudaError_t emu_allow_smem(const void *kernel, size_t bytes)
{
    if (bytes > 227 * 1024)
        return cudaErrorInvalidValue;
    allowed()[kernel] = bytes;
    return cudaSuccess;
}

void emu_launch_blocks(const emu_launch &how, const void *kernel, std::function<void()> body)
{
    const unsigned n = how.block.x;
    const auto more = allowed().find(kernel);
    const size_t limit = more == allowed().end() ? 48 * 1024 : more->second;
    const bool fits = how.block.y == 1 && how.block.z == 1 && n > 0 && n <= MAX_THREADS &&
                      n % 32 == 0 && how.grid.x > 0 && how.grid.y > 0 && how.grid.z > 0 &&
                      how.grid.y < 65536 && how.grid.z < 65536;
    if (!fits || how.smem > limit || emu_fails("launch")) {
        std::fprintf(stderr, "emulated launch of %s refused\n", how.name);
        emu_fail(fits ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration);
        return;
    }
    emu_queue(how.stream, [how, body] {
        emu_run_blocks(how, body);
        return true;
    });
}

void emu_run_blocks(const emu_launch &how, const std::function<void()> &body)
{
    std::vector<unsigned> blocks(how.grid.x * how.grid.y * how.grid.z);
    for (size_t i = 0; i < blocks.size(); i++)
        blocks[i] = (unsigned)i;
    std::shuffle(blocks.begin(), blocks.end(), emu_random());
    m.how = &how;
    m.body = &body;
    void *memory = nullptr;
    if (posix_memalign(&memory, 128, ASAN ? std::max<size_t>(how.smem, 1) : how.smem + GUARD) != 0)
        die("no memory for shared memory");
    m.smem = static_cast<unsigned char *>(memory);
    for (unsigned i : blocks)
        run_block(how,
                  dim3(i % how.grid.x, i / how.grid.x % how.grid.y, i / how.grid.x / how.grid.y));
    std::free(m.smem);
    m.smem = nullptr;
    m.how = nullptr;
}
