/* _tracker: which group's code has allocated what, for every block of CPython's allocators.
 *
 * Hooks around the three allocator domains charge a block to the group whose context made it,
 * and credit that group when the block is freed, by whomever. A shadow of the address space
 * says of each block whose it is and how large. Figures and choices: docs/topics/tracking.md.
 *
 * Invariants
 *
 * 1. A block is counted iff the shadow has an entry at its first granule. The entry is written
 *    after the block is had and cleared before it is given back, so a block that is unknown
 *    (from before install(), or made while counting was off) needs no care anywhere.
 * 2. Entries inside a block carry no group: a stale one is never taken for a block's start.
 * 3. Plain counters are written with the GIL of the main interpreter held, atomic ones by
 *    everybody else.
 * 4. Without the GIL no Python object is touched. With it, only resolve() touches any, and
 *    what that might allocate passes through unseen, because `here.busy` is set.
 * 5. The original allocator is called with `here.busy` set, so that a block which pymalloc
 *    takes from the raw domain is counted once.
 * 6. Hooks keep the original's ctx and ignore it: an allocator that is read while it is being
 *    set works whichever of its functions are already there.
 * 7. Scope alone writes the context variable, and tells `here` of the group before and after:
 *    setting a variable does not change the context's version.
 * 8. A slot is used again only when nothing charged to it is live and no context names it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef Py_GIL_DISABLED
/* Built only to say why not. */
PyMODINIT_FUNC
PyInit__tracker(void)
{
    PyErr_SetString(PyExc_ImportError, "a free-threaded Python: counting relies on the GIL");
    return NULL;
}
#else

#include <structmember.h>

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>

#include "membound_tracker.h"

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define INLINE static inline __attribute__((always_inline))
#define COLD static __attribute__((cold, noinline))

#if PY_VERSION_HEX >= 0x030D0000
#define thread_state() PyThreadState_GetUnchecked()
#else
#define thread_state() _PyThreadState_UncheckedGet()
#endif

/* ------------------------------------------------------------------- groups and counters */

enum { NONE, ROOT };          /* what an entry says of a block that is not counted; of root's */
#define NARROW_GROUPS 126     /* besides root, with 7 bits */
#define WIDE_GROUPS 65535     /* with 17 bits */
#define MAX_GROUPS (ROOT + WIDE_GROUPS)

/* Of blocks of the MEM and OBJ domains. */
typedef struct {
    uint64_t allocated_bytes, allocated_objects, deallocated_bytes, deallocated_objects;
    int64_t peak_bytes;     /* of all that was live at one time */
    int64_t elsewhere;      /* live bytes in shared_counts, as last seen with the GIL */
} __attribute__((aligned(64))) counts_t;

/* Of blocks of the RAW domain and of NumPy, and of bytes that were charged. */
typedef struct {
    _Atomic uint64_t allocated_bytes, allocated_objects, deallocated_bytes, deallocated_objects;
    _Atomic uint64_t charged_bytes;   /* of allocated_bytes, by charge(), less discharge() */
} __attribute__((aligned(64))) shared_counts_t;

typedef struct {
    PyObject *token;         /* what a context holds; NULL while nobody has had the slot */
    struct Group *group;     /* not a reference; NULL if there is no object for it any more */
    _Atomic uint32_t generation;   /* how many groups have had it */
    bool retired;
    counts_t before;         /* what was counted for those that had it earlier */
} slot_t;

static counts_t counts[MAX_GROUPS + 1];
static shared_counts_t shared_counts[MAX_GROUPS + 1];
static slot_t slots[MAX_GROUPS + 1];
static uint32_t used_slots = NONE;   /* those beyond were never used */
static uint32_t next_slot = ROOT;    /* where the search for a retired one goes on */
static uint32_t most_groups = NARROW_GROUPS;

INLINE void
count_allocated(uint32_t group, size_t n)
{
    counts_t *c = &counts[group];
    c->allocated_bytes += n;
    c->allocated_objects++;
    int64_t live = (int64_t)(c->allocated_bytes - c->deallocated_bytes) + c->elsewhere;
    if (live > c->peak_bytes)
        c->peak_bytes = live;
}

INLINE void
count_deallocated(uint32_t group, size_t n)
{
    counts[group].deallocated_bytes += n;
    counts[group].deallocated_objects++;
}

/* Brings `elsewhere` and the peak up to date; with the GIL. */
static void
look_elsewhere(uint32_t group)
{
    counts_t *c = &counts[group];
    uint64_t freed = shared_counts[group].deallocated_bytes;   /* first: never below 0 */
    c->elsewhere = (int64_t)(shared_counts[group].allocated_bytes - freed);
    int64_t live = (int64_t)(c->allocated_bytes - c->deallocated_bytes) + c->elsewhere;
    if (live > c->peak_bytes)
        c->peak_bytes = live;
}

static void
count_allocated_shared(uint32_t group, size_t n)
{
    atomic_fetch_add_explicit(&shared_counts[group].allocated_bytes, n, memory_order_relaxed);
    atomic_fetch_add_explicit(&shared_counts[group].allocated_objects, 1, memory_order_relaxed);
}

static void
count_deallocated_shared(uint32_t group, size_t n)
{
    atomic_fetch_add_explicit(&shared_counts[group].deallocated_objects, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&shared_counts[group].deallocated_bytes, n, memory_order_relaxed);
}

/* What was counted for the group that has the slot; with the GIL. */
static counts_t
total(uint32_t group)
{
    look_elsewhere(group);
    counts_t sum = counts[group], *before = &slots[group].before;
    shared_counts_t *shared = &shared_counts[group];
    sum.deallocated_bytes += shared->deallocated_bytes - before->deallocated_bytes;
    sum.deallocated_objects += shared->deallocated_objects - before->deallocated_objects;
    sum.allocated_bytes += shared->allocated_bytes - before->allocated_bytes;
    sum.allocated_objects += shared->allocated_objects - before->allocated_objects;
    return sum;
}

/* --------------------------------------------------------------------- the current group */

static PyObject *variable;                    /* the ContextVar; never freed */
static PyInterpreterState *main_interpreter;
static bool finalizing;
static uint64_t failed_lookups;
static PyTypeObject Token_Type, Group_Type, Scope_Type;

typedef struct {
    PyObject_HEAD
    uint32_t group;
} Token;

/* What this thread was found to charge, and the state of its context that this was found for. */
typedef struct {
    PyThreadState *thread;
    uint64_t thread_id, context_version;
    uint32_t group, generation;
    bool busy;
} here_t;

/* With a thread that no thread state is equal to. */
static __thread here_t here
#ifdef __GLIBC__
    __attribute__((tls_model("initial-exec")))
#endif
    = {.thread = (PyThreadState *)1, .group = ROOT};

INLINE void
remember(PyThreadState *thread, uint32_t group)
{
    here.thread = thread;
    here.thread_id = thread->id;
    here.context_version = thread->context_ver;
    here.group = group;
    here.generation = slots[group].generation;
}

/* Looks up the group of the current context. Keeps a pending exception; errors mean root. */
COLD uint32_t
resolve(PyThreadState *thread)
{
    if (thread == NULL)
        return ROOT;
    uint32_t group = ROOT;
    here.busy = true;
    if (thread->interp != main_interpreter) {
        /* On 3.11 it has the same GIL; later it may have its own, and is not counted. */
        group = PY_VERSION_HEX < 0x030C0000 ? ROOT : NONE;
    }
    else if (thread->context != NULL && !finalizing) {
        PyObject *value = NULL;
#if PY_VERSION_HEX >= 0x030C0000
        PyObject *pending = PyErr_GetRaisedException();
#else
        PyObject *pending, *pending_value, *pending_traceback;
        PyErr_Fetch(&pending, &pending_value, &pending_traceback);
#endif
        if (PyContextVar_Get(variable, NULL, &value) < 0) {
            failed_lookups++;   /* at the recursion limit, for one */
            PyErr_Clear();
        }
        else if (value != NULL) {
            if (Py_IS_TYPE(value, &Token_Type))
                group = ((Token *)value)->group;
            Py_DECREF(value);   /* the context has another reference */
        }
#if PY_VERSION_HEX >= 0x030C0000
        PyErr_SetRaisedException(pending);
#else
        PyErr_Restore(pending, pending_value, pending_traceback);
#endif
    }
    remember(thread, group);
    here.busy = false;
    return group;
}

/* With the GIL. */
INLINE uint32_t
current_group(void)
{
    PyThreadState *thread = thread_state();
    if (LIKELY(thread == here.thread && thread->id == here.thread_id
               && thread->context_ver == here.context_version))
        return here.group;
    return resolve(thread);
}

/* Whether this thread has the GIL of the main interpreter. On 3.11 the thread state that is
 * current is the process's, so it may be another thread's. */
static bool
has_gil(void)
{
    PyThreadState *thread = thread_state();
#if PY_VERSION_HEX < 0x030C0000
    return thread != NULL && thread == PyGILState_GetThisThreadState();
#else
    return thread != NULL && thread->interp == main_interpreter;
#endif
}

/* Without the GIL: the group that the thread charged last, if it is still there. */
static uint32_t
last_group(void)
{
    uint32_t group = here.group;
    return group != NONE && slots[group].generation == here.generation ? group : ROOT;
}

/* ----------------------------------------------------------------------------- the shadow */

/* One entry for each granule of 16 bytes, in leaves of lazily mapped memory. An entry is the
 * group above the code of the size: size - 1, or all ones for a large block, whose size stands
 * in the next granules' entries, CODE_BITS in each. */
#define GRANULE 16
#if defined(__aarch64__)
#define ADDRESS_BITS 48
#else
#define ADDRESS_BITS 47
#endif
#define LEAF_BITS 26
#define UNTRACKABLE (~((((uintptr_t)1 << ADDRESS_BITS) - 1) & ~(uintptr_t)(GRANULE - 1)))
#define CODE_BITS(wide) ((wide) ? 15 : 9)
#define LARGE(wide) ((1u << CODE_BITS(wide)) - 1)
#define LARGE_ENTRIES 5
#define SHADOW_SHIFT(wide) ((wide) ? 2 : 3)
#define LEAF_BYTES(wide) (((size_t)1 << (LEAF_BITS - SHADOW_SHIFT(wide))) + 4096)

/* Where the entry of address 0 would be, as seen from each leaf; 0: not mapped. */
static _Atomic uintptr_t directory[(size_t)1 << (ADDRESS_BITS - LEAF_BITS)];
static _Atomic uint64_t lost_blocks;   /* not counted for want of a leaf or an aligned address */
static _Atomic uint64_t freed_unseen;  /* freed by another than the hooks, found out later */
static bool is_wide;

COLD uintptr_t
map_leaf(bool wide, uintptr_t address)
{
    size_t index = address >> LEAF_BITS;
    void *leaf = mmap(NULL, LEAF_BYTES(wide), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (leaf == MAP_FAILED)
        return 0;
#ifdef MADV_NOHUGEPAGE
    madvise(leaf, LEAF_BYTES(wide), MADV_NOHUGEPAGE);
#endif
#ifdef MADV_DONTDUMP
    madvise(leaf, LEAF_BYTES(wide), MADV_DONTDUMP);
#endif
    uintptr_t origin = (uintptr_t)leaf - ((index << LEAF_BITS) >> SHADOW_SHIFT(wide));
    uintptr_t others = 0;
    if (!atomic_compare_exchange_strong(&directory[index], &others, origin)) {
        munmap(leaf, LEAF_BYTES(wide));
        return others;
    }
    return origin;
}

/* The entry of an address; NULL if it has none, unless `make`. */
INLINE char *
find_entry(bool wide, const void *p, bool make)
{
    uintptr_t address = (uintptr_t)p;
    if (UNLIKELY(address & UNTRACKABLE))
        return NULL;
    uintptr_t origin = atomic_load_explicit(&directory[address >> LEAF_BITS], memory_order_relaxed);
    if (UNLIKELY(origin == 0) && (!make || (origin = map_leaf(wide, address)) == 0))
        return NULL;
    return (char *)(origin + (address >> SHADOW_SHIFT(wide)));
}

INLINE uint32_t
load(bool wide, const char *entry, int i)
{
    return wide ? ((const uint32_t *)entry)[i] : ((const uint16_t *)entry)[i];
}

INLINE void
store(bool wide, char *entry, int i, uint32_t value)
{
    if (wide)
        ((uint32_t *)entry)[i] = value;
    else
        ((uint16_t *)entry)[i] = (uint16_t)value;
}

INLINE uint32_t
entry_group(bool wide, uint32_t value)
{
    return value >> CODE_BITS(wide);
}

INLINE size_t
entry_size(bool wide, const char *entry, uint32_t value)
{
    uint32_t code = value & LARGE(wide);
    if (LIKELY(code != LARGE(wide)))
        return (size_t)code + 1;
    size_t size = 0;
    for (int i = LARGE_ENTRIES; i > 0; i--)
        size = size << CODE_BITS(wide) | load(wide, entry, i);
    return size;
}

/* Writes down a block, and counts it. One of 0 bytes counts as 1. */
INLINE void
note(bool wide, bool shared, void *p, size_t n, uint32_t group)
{
    char *entry = find_entry(wide, p, true);
    if (UNLIKELY(entry == NULL)) {
        atomic_fetch_add_explicit(&lost_blocks, 1, memory_order_relaxed);
        return;
    }
    uint32_t stale = load(wide, entry, 0);
    if (UNLIKELY(entry_group(wide, stale) != NONE)) {
        atomic_fetch_add_explicit(&freed_unseen, 1, memory_order_relaxed);
        (shared ? count_deallocated_shared : count_deallocated)(entry_group(wide, stale),
                                                                entry_size(wide, entry, stale));
    }
    n += n == 0;
    uint32_t code = (uint32_t)n - 1;
    if (UNLIKELY(n > LARGE(wide))) {
        code = LARGE(wide);
        size_t rest = n;
        for (int i = 1; i <= LARGE_ENTRIES; i++) {
            store(wide, entry, i, rest & LARGE(wide));
            rest >>= CODE_BITS(wide);
        }
    }
    store(wide, entry, 0, group << CODE_BITS(wide) | code);
    (shared ? count_allocated_shared : count_allocated)(group, n);
}

/* The entry of a block; 0 if it is not counted, whatever a larger one has left there. */
INLINE uint32_t
look_at(bool wide, const char *entry)
{
    uint32_t value = entry == NULL ? 0 : load(wide, entry, 0);
    return entry_group(wide, value) == NONE ? 0 : value;
}

/* The same, which is cleared. */
INLINE uint32_t
take_entry(bool wide, char *entry)
{
    uint32_t value = look_at(wide, entry);
    if (value != 0)
        store(wide, entry, 0, 0);
    return value;
}

/* Counts a block whose entry was taken as freed; what it says of the size is still there. */
INLINE void
count_taken(bool wide, bool shared, const char *entry, uint32_t value)
{
    (shared ? count_deallocated_shared : count_deallocated)(entry_group(wide, value),
                                                            entry_size(wide, entry, value));
}

/* ------------------------------------------------------------------------------ the hooks */

#define DOMAINS 3   /* PYMEM_DOMAIN_RAW, _MEM, _OBJ */
static PyMemAllocatorEx originals[DOMAINS];
static bool installed, enabled;

/* jemalloc and mimalloc align what is smaller than a granule to 8 bytes only. */
#define A_GRANULE(n) ((n) < GRANULE ? GRANULE : (n))
#define IS_SHARED(domain) ((domain) == PYMEM_DOMAIN_RAW)

INLINE uint32_t
group_to_charge(int domain)
{
    return IS_SHARED(domain) && !has_gil() ? last_group() : current_group();
}

INLINE void *
tracked_malloc(bool wide, int domain, size_t n)
{
    PyMemAllocatorEx *original = &originals[domain];
    if (UNLIKELY(!enabled || here.busy))
        return original->malloc(original->ctx, A_GRANULE(n));
    uint32_t group = group_to_charge(domain);
    here.busy = true;
    void *p = original->malloc(original->ctx, A_GRANULE(n));
    here.busy = false;
    if (LIKELY(p != NULL && group != NONE))
        note(wide, IS_SHARED(domain), p, n, group);
    return p;
}

INLINE void *
tracked_calloc(bool wide, int domain, size_t count, size_t size)
{
    PyMemAllocatorEx *original = &originals[domain];
    size_t n = count * size;   /* PyMem_Calloc has looked for an overflow */
    if (n < GRANULE) {
        count = 1;
        size = GRANULE;
    }
    if (UNLIKELY(!enabled || here.busy))
        return original->calloc(original->ctx, count, size);
    uint32_t group = group_to_charge(domain);
    here.busy = true;
    void *p = original->calloc(original->ctx, count, size);
    here.busy = false;
    if (LIKELY(p != NULL && group != NONE))
        note(wide, IS_SHARED(domain), p, n, group);
    return p;
}

INLINE void
tracked_free(bool wide, int domain, void *p)
{
    PyMemAllocatorEx *original = &originals[domain];
    if (LIKELY(p != NULL)) {
        char *entry = find_entry(wide, p, false);
        uint32_t value = take_entry(wide, entry);
        if (LIKELY(value != 0))
            count_taken(wide, IS_SHARED(domain), entry, value);
    }
    original->free(original->ctx, p);
}

/* The entry is taken before the call: right after it the old block may be another thread's. */
INLINE void *
tracked_realloc(bool wide, int domain, void *p, size_t n)
{
    if (p == NULL)
        return tracked_malloc(wide, domain, n);
    PyMemAllocatorEx *original = &originals[domain];
    char *entry = find_entry(wide, p, false);
    uint32_t value = take_entry(wide, entry);
    size_t old_n = value == 0 ? 0 : entry_size(wide, entry, value);
    bool was_busy = here.busy;
    uint32_t group = LIKELY(enabled && !was_busy) ? group_to_charge(domain) : NONE;
    here.busy = true;
    void *q = original->realloc(original->ctx, p, A_GRANULE(n));
    here.busy = was_busy;
    if (UNLIKELY(q == NULL)) {
        if (value != 0)
            store(wide, entry, 0, value);
        return NULL;
    }
    if (LIKELY(value != 0)) {
        uint32_t old_group = entry_group(wide, value);
        (IS_SHARED(domain) ? count_deallocated_shared : count_deallocated)(old_group, old_n);
    }
    if (LIKELY(group != NONE))
        note(wide, IS_SHARED(domain), q, n, group);
    return q;
}

#define HOOKS(name, wide, domain)                                                                \
    static void *name##_malloc(void *Py_UNUSED(ctx), size_t n)                                   \
    { return tracked_malloc(wide, domain, n); }                                                  \
    static void *name##_calloc(void *Py_UNUSED(ctx), size_t count, size_t size)                  \
    { return tracked_calloc(wide, domain, count, size); }                                        \
    static void *name##_realloc(void *Py_UNUSED(ctx), void *p, size_t n)                         \
    { return tracked_realloc(wide, domain, p, n); }                                              \
    static void name##_free(void *Py_UNUSED(ctx), void *p)                                       \
    { tracked_free(wide, domain, p); }

HOOKS(narrow_raw, false, PYMEM_DOMAIN_RAW)
HOOKS(narrow_mem, false, PYMEM_DOMAIN_MEM)
HOOKS(narrow_obj, false, PYMEM_DOMAIN_OBJ)
HOOKS(wide_raw, true, PYMEM_DOMAIN_RAW)
HOOKS(wide_mem, true, PYMEM_DOMAIN_MEM)
HOOKS(wide_obj, true, PYMEM_DOMAIN_OBJ)

#define HOOK(name) {NULL, name##_malloc, name##_calloc, name##_realloc, name##_free}
static const PyMemAllocatorEx hooks[2][DOMAINS] = {
    {HOOK(narrow_raw), HOOK(narrow_mem), HOOK(narrow_obj)},
    {HOOK(wide_raw), HOOK(wide_mem), HOOK(wide_obj)},
};

/* Whether a domain's allocator is this one, so that it may be set without harm to others. */
static bool
on_top(int domain)
{
    PyMemAllocatorEx now;
    PyMem_GetAllocator(domain, &now);
    return now.free == hooks[is_wide][domain].free;
}

/* Sets the hooks. While counting is off, blocks come straight from the original, and only what
 * is freed is looked at. */
static void
set_hooks(int domain)
{
    PyMemAllocatorEx hook = hooks[is_wide][domain];
    hook.ctx = originals[domain].ctx;
    if (!enabled) {
        hook.malloc = originals[domain].malloc;
        hook.calloc = originals[domain].calloc;
    }
    PyMem_SetAllocator(domain, &hook);
}

static void
switch_counting(bool on)
{
    enabled = on;
    for (int domain = 0; domain < DOMAINS; domain++)
        if (on_top(domain))
            set_hooks(domain);
}

static void *
malloc_in(int domain, size_t n)
{
    return domain == PYMEM_DOMAIN_RAW ? PyMem_RawMalloc(n)
           : domain == PYMEM_DOMAIN_MEM ? PyMem_Malloc(n) : PyObject_Malloc(n);
}

static void
free_in(int domain, void *p)
{
    domain == PYMEM_DOMAIN_RAW ? PyMem_RawFree(p)
    : domain == PYMEM_DOMAIN_MEM ? PyMem_Free(p) : PyObject_Free(p);
}

/* Whether blocks of a domain do not come by the hooks any more: a tool that was there before
 * them has put back what it had found. One that came later calls them. */
static bool
displaced(int domain)
{
    if (on_top(domain)) {
        set_hooks(domain);   /* a tool that ends puts back those from when it began */
        return false;
    }
    uint32_t group = current_group();
    bool was_enabled = enabled;
    enabled = true;
    uint64_t before = total(group).allocated_objects;
    free_in(domain, malloc_in(domain, 1));
    bool counted = total(group).allocated_objects != before;
    enabled = was_enabled;
    return group != NONE && !counted;
}

/* ------------------------------------------------------------------------- NumPy (NEP 49) */

/* NumPy's own declarations; the library is looked up in its table of functions, so that
 * neither building nor running needs it. */
typedef struct {
    char name[127];
    uint8_t version;
    void *ctx;
    void *(*malloc)(void *ctx, size_t n);
    void *(*calloc)(void *ctx, size_t count, size_t size);
    void *(*realloc)(void *ctx, void *p, size_t n);
    void (*free)(void *ctx, void *p, size_t n);
} PyDataMem_Handler;

enum { SET_HANDLER = 304, GET_HANDLER, DEFAULT_HANDLER, FEATURE_VERSION = 211 };
#define FIRST_WITH_HANDLERS 0x0F   /* NumPy 1.22 */

static void **numpy;   /* its table; NULL while it is not loaded */
static bool no_numpy;  /* too old a one */
static PyDataMem_Handler *numpys;
static PyObject *numpy_handler;

/* NumPy 2.5 takes its memory from the raw domain, earlier ones from the C library: `was_busy`
 * has a block counted once in either case. */
static void *
note_data(bool was_busy, void *p, size_t n)
{
    here.busy = was_busy;
    uint32_t group = p != NULL && enabled && !was_busy ? group_to_charge(PYMEM_DOMAIN_RAW) : NONE;
    if (group != NONE) {
        is_wide ? note(true, true, p, n, group) : note(false, true, p, n, group);
        if (has_gil())
            look_elsewhere(group);   /* what is freed soon counts for the peak */
    }
    return p;
}

INLINE bool
get_busy(void)
{
    bool was_busy = here.busy;
    here.busy = true;
    return was_busy;
}

static void *
data_malloc(void *Py_UNUSED(ctx), size_t n)
{
    bool was_busy = get_busy();
    return note_data(was_busy, numpys->malloc(numpys->ctx, A_GRANULE(n)), n);
}

static void *
data_calloc(void *Py_UNUSED(ctx), size_t count, size_t size)
{
    size_t n = count * size;
    bool was_busy = get_busy();
    return note_data(was_busy, n < GRANULE ? numpys->calloc(numpys->ctx, 1, GRANULE)
                                           : numpys->calloc(numpys->ctx, count, size), n);
}

static void *
data_realloc(void *Py_UNUSED(ctx), void *p, size_t n)
{
    char *entry = find_entry(is_wide, p, false);
    uint32_t value = p == NULL ? 0 : take_entry(is_wide, entry);
    size_t old_n = value == 0 ? 0 : entry_size(is_wide, entry, value);
    bool was_busy = get_busy();
    void *q = numpys->realloc(numpys->ctx, p, A_GRANULE(n));
    if (value != 0 && q == NULL)
        store(is_wide, entry, 0, value);
    else if (value != 0)
        count_deallocated_shared(entry_group(is_wide, value), old_n);
    return note_data(was_busy, q, n);
}

static void
data_free(void *Py_UNUSED(ctx), void *p, size_t n)
{
    char *entry = find_entry(is_wide, p, false);
    uint32_t value = p == NULL ? 0 : take_entry(is_wide, entry);
    if (value != 0)
        count_taken(is_wide, true, entry, value);
    numpys->free(numpys->ctx, p, n);
}

static PyDataMem_Handler data_handler = {
    "membound_tracker", 1, NULL, data_malloc, data_calloc, data_realloc, data_free,
};

/* Looks for NumPy among the modules that are imported; never imports it. */
static int
find_numpy(void)
{
    static const char *const names[] = {"numpy._core._multiarray_umath",
                                        "numpy.core._multiarray_umath"};
    PyObject *module = NULL;
    for (int i = 0; i < 2 && module == NULL; i++)
        module = PyDict_GetItemString(PyImport_GetModuleDict(), names[i]);
    if (module == NULL)
        return 0;
    PyObject *capsule = PyObject_GetAttrString(module, "_ARRAY_API");
    if (capsule == NULL) {
        PyErr_Clear();   /* it is being imported */
        return 0;
    }
    void **table = PyCapsule_GetPointer(capsule, NULL);
    Py_DECREF(capsule);   /* the module has another reference */
    if (table == NULL)
        return -1;
    if (((unsigned (*)(void))table[FEATURE_VERSION])() < FIRST_WITH_HANDLERS) {
        no_numpy = true;
        return 0;
    }
    numpys = PyCapsule_GetPointer(*(PyObject **)table[DEFAULT_HANDLER], "mem_handler");
    if (numpys == NULL)
        return -1;
    numpy_handler = PyCapsule_New(&data_handler, "mem_handler", NULL);
    if (numpy_handler == NULL)
        return -1;
    numpy = table;
    return 0;
}

/* Has the arrays that this context makes from now on counted, unless it has a handler of its
 * own. The handler is a context variable, as the group is. */
static int
handle_numpy(void)
{
    if (numpy == NULL && (no_numpy || find_numpy() < 0 || numpy == NULL))
        return PyErr_Occurred() ? -1 : 0;
    PyObject *now = ((PyObject *(*)(void))numpy[GET_HANDLER])();
    if (now == NULL)
        return -1;
    bool is_default = now == *(PyObject **)numpy[DEFAULT_HANDLER];
    Py_DECREF(now);
    if (is_default) {
        now = ((PyObject *(*)(PyObject *))numpy[SET_HANDLER])(numpy_handler);
        if (now == NULL)
            return -1;
        Py_DECREF(now);
    }
    return 0;
}

/* --------------------------------------------------------------------- groups, for Python */

static PyObject *TrackingError;

typedef struct Group {
    PyObject_HEAD
    uint32_t index, generation;
    PyObject *path;
} Group;

static void
token_dealloc(PyObject *self)
{
    PyObject_Free(self);
}

static PyTypeObject Token_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "membound_async.allocator._tracker.Token",
    .tp_doc = PyDoc_STR("What a context holds for the group that its code charges."),
    .tp_basicsize = sizeof(Token),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = token_dealloc,
};

/* Whether another group may have the slot: all that was charged is freed, no context is in it. */
static bool
is_drained(uint32_t index)
{
    counts_t sum = total(index);
    return slots[index].retired && Py_REFCNT(slots[index].token) == 1
           && sum.allocated_bytes == sum.deallocated_bytes
           && sum.allocated_objects == sum.deallocated_objects;
}

static uint32_t
find_slot(void)
{
    if (used_slots < ROOT + most_groups)
        return used_slots + 1;
    for (uint32_t looked_at = 0; looked_at < most_groups; looked_at++) {
        next_slot = next_slot < ROOT + most_groups ? next_slot + 1 : ROOT + 1;
        if (is_drained(next_slot))
            return next_slot;
    }
    return NONE;
}

static PyObject *
group_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    PyObject *path;
    if (!PyArg_ParseTuple(args, "U:Group", &path))
        return NULL;
    uint32_t index = find_slot();
    if (index == NONE)
        return PyErr_Format(TrackingError,
                            "no group for %R: all %u are in use, or have memory that is still "
                            "live or tasks that are still in them; unregister some%s",
                            path, most_groups,
                            most_groups < WIDE_GROUPS ? ", or use install(groups=65535)" : "");
    Token *token = PyObject_New(Token, &Token_Type);
    if (token == NULL)
        return NULL;
    Group *self = (Group *)type->tp_alloc(type, 0);
    if (self == NULL) {
        Py_DECREF(token);
        return NULL;
    }
    slot_t *slot = &slots[index];
    if (index > used_slots)
        used_slots = index;
    else {
        counts_t sum = total(index);
        slot->before.allocated_bytes += sum.allocated_bytes;
        slot->before.allocated_objects += sum.allocated_objects;
        slot->before.deallocated_bytes += sum.deallocated_bytes;
        slot->before.deallocated_objects += sum.deallocated_objects;
        counts[index].peak_bytes = 0;
    }
    token->group = self->index = index;
    self->generation = ++slot->generation;
    self->path = Py_NewRef(path);
    slot->group = self;
    slot->retired = false;
    Py_XSETREF(slot->token, (PyObject *)token);
    return (PyObject *)self;
}

static bool
is_gone(Group *self)
{
    return slots[self->index].generation != self->generation;
}

static void
group_dealloc(Group *self)
{
    if (!is_gone(self)) {
        slots[self->index].group = NULL;
        slots[self->index].retired = true;
    }
    Py_XDECREF(self->path);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *
group_retire(Group *self, PyObject *Py_UNUSED(unused))
{
    if (self->index == ROOT)
        return PyErr_Format(TrackingError, "the root group cannot be unregistered");
    if (!is_gone(self))
        slots[self->index].retired = true;
    Py_RETURN_NONE;
}

static PyObject *
gone(Group *self)
{
    return PyErr_Format(TrackingError,
                        "group %R was unregistered, and its slot has another group now",
                        self->path);
}

static PyObject *
group_counts(Group *self, PyObject *Py_UNUSED(unused))
{
    if (is_gone(self))
        return gone(self);
    counts_t sum = total(self->index);
    return Py_BuildValue("KKKKL", (unsigned long long)sum.allocated_bytes,
                         (unsigned long long)sum.allocated_objects,
                         (unsigned long long)sum.deallocated_bytes,
                         (unsigned long long)sum.deallocated_objects,
                         (long long)sum.peak_bytes);
}

static PyObject *
group_live_bytes(Group *self, void *Py_UNUSED(closure))
{
    if (is_gone(self))
        return gone(self);
    counts_t sum = total(self->index);
    return PyLong_FromLongLong((long long)(sum.allocated_bytes - sum.deallocated_bytes));
}

static PyObject *
group_live_objects(Group *self, void *Py_UNUSED(closure))
{
    if (is_gone(self))
        return gone(self);
    counts_t sum = total(self->index);
    return PyLong_FromLongLong((long long)(sum.allocated_objects - sum.deallocated_objects));
}

/* -1: more would be discharged than was charged. From any thread. */
static int
charge(uint32_t group, size_t n)
{
    atomic_fetch_add_explicit(&shared_counts[group].charged_bytes, n, memory_order_relaxed);
    atomic_fetch_add_explicit(&shared_counts[group].allocated_bytes, n, memory_order_relaxed);
    return 0;
}

static int
discharge(uint32_t group, size_t n)
{
    _Atomic uint64_t *charged = &shared_counts[group].charged_bytes;
    uint64_t now = *charged;
    do {
        if (now < n)
            return -1;
    } while (!atomic_compare_exchange_weak(charged, &now, now - n));
    atomic_fetch_add_explicit(&shared_counts[group].deallocated_bytes, n, memory_order_relaxed);
    return 0;
}

static PyObject *
group_charge(Group *self, PyObject *arg, int (*change)(uint32_t, size_t))
{
    Py_ssize_t n = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    if (n < 0)
        return PyErr_Format(PyExc_ValueError, "nbytes is %zd; it cannot be negative", n);
    if (is_gone(self))
        return gone(self);
    if (change(self->index, (size_t)n) < 0)
        return PyErr_Format(TrackingError,
                            "%zd bytes cannot be discharged from group %R: only %llu are charged",
                            n, self->path,
                            (unsigned long long)shared_counts[self->index].charged_bytes);
    look_elsewhere(self->index);
    Py_RETURN_NONE;
}

static PyObject *
group_do_charge(Group *self, PyObject *arg)
{
    return group_charge(self, arg, charge);
}

static PyObject *
group_do_discharge(Group *self, PyObject *arg)
{
    return group_charge(self, arg, discharge);
}

static PyObject *
group_repr(Group *self)
{
    return PyUnicode_FromFormat("<AllocationGroup %R>", self->path);
}

static PyMethodDef group_methods[] = {
    {"charge", (PyCFunction)group_do_charge, METH_O, NULL},
    {"discharge", (PyCFunction)group_do_discharge, METH_O, NULL},
    {"_counts", (PyCFunction)group_counts, METH_NOARGS, NULL},
    {"_retire", (PyCFunction)group_retire, METH_NOARGS, NULL},
    {NULL},
};

static PyMemberDef group_members[] = {
    {"path", T_OBJECT, offsetof(Group, path), READONLY, NULL},
    {"_index", T_UINT, offsetof(Group, index), READONLY, NULL},
    {NULL},
};

static PyGetSetDef group_getset[] = {
    {"live_bytes", (getter)group_live_bytes, NULL, NULL, NULL},
    {"live_objects", (getter)group_live_objects, NULL, NULL, NULL},
    {NULL},
};

static PyTypeObject Group_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "membound_async.allocator._tracker.Group",
    .tp_basicsize = sizeof(Group),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = group_new,
    .tp_dealloc = (destructor)group_dealloc,
    .tp_repr = (reprfunc)group_repr,
    .tp_methods = group_methods,
    .tp_members = group_members,
    .tp_getset = group_getset,
};
/* --------------------------------------------------------------------------------- scopes */

typedef struct {
    PyObject_HEAD
    Group *group;
    Token *token, *outer;   /* outer: while it is entered */
    PyObject *context;      /* that it is entered in; not a reference: only compared */
} Scope;

static PyObject *
scope_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs))
{
    PyObject *group;
    if (!PyArg_ParseTuple(args, "O!:Scope", &Group_Type, &group))
        return NULL;
    Scope *self = (Scope *)type->tp_alloc(type, 0);
    if (self != NULL)
        self->group = (Group *)Py_NewRef(group);
    return (PyObject *)self;
}

static void
scope_dealloc(Scope *self)
{
    Py_XDECREF(self->group);
    Py_XDECREF(self->token);
    Py_XDECREF(self->outer);
    Py_TYPE(self)->tp_free(self);
}

/* A new reference. */
static Token *
current_token(void)
{
    PyObject *value;
    if (PyContextVar_Get(variable, slots[ROOT].token, &value) < 0)
        return NULL;
    if (!Py_IS_TYPE(value, &Token_Type))   /* somebody has set what is not theirs */
        Py_SETREF(value, Py_NewRef(slots[ROOT].token));
    return (Token *)value;
}

/* Sets the variable; what that allocates is charged to `meanwhile`. */
static int
change_group(Token *to, Token *meanwhile)
{
    PyThreadState *thread = PyThreadState_Get();
    uint32_t before = current_group();
    remember(thread, meanwhile->group);
    PyObject *reset = PyContextVar_Set(variable, (PyObject *)to);
    remember(thread, reset == NULL ? before : to->group);
    Py_XDECREF(reset);
    return reset == NULL ? -1 : 0;
}

static PyObject *
scope_enter(Scope *self, PyObject *Py_UNUSED(unused))
{
    Group *group = self->group;
    if (self->outer != NULL)
        return PyErr_Format(TrackingError, "the scope of group %R is entered already", group->path);
    if (is_gone(group) || slots[group->index].retired)
        return PyErr_Format(TrackingError, "group %R is not registered any more", group->path);
    if (enabled && handle_numpy() < 0)
        return NULL;
    Token *outer = current_token();
    if (outer == NULL)
        return NULL;
    Token *token = (Token *)Py_NewRef(slots[group->index].token);
    if (change_group(token, outer) < 0) {
        Py_DECREF(outer);
        Py_DECREF(token);
        return NULL;
    }
    self->token = token;
    self->outer = outer;
    self->context = PyThreadState_Get()->context;
    return Py_NewRef((PyObject *)group);
}

/* Never resets the variable, which would delete it: that allocates while the old value is still
 * to be found, and so is cached. What setting allocates outlives the scope: it is the outer's. */
static PyObject *
scope_exit(Scope *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (self->outer == NULL)
        return PyErr_Format(TrackingError, "the scope of group %R is not entered",
                            self->group->path);
    Token *now = current_token();
    if (now == NULL)
        return NULL;
    Py_DECREF(now);
    if (now != self->token || PyThreadState_Get()->context != self->context) {
        if (nargs > 0 && args[0] != Py_None)
            Py_RETURN_NONE;   /* what is being raised says more */
        return PyErr_Format(TrackingError,
                            "group %R is left where another is current: scopes are left in the "
                            "opposite order, and in the task that has entered them",
                            self->group->path);
    }
    if (change_group(self->outer, self->outer) < 0)
        return NULL;
    Py_CLEAR(self->outer);
    Py_CLEAR(self->token);
    Py_RETURN_NONE;
}

static PyMethodDef scope_methods[] = {
    {"__enter__", (PyCFunction)scope_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))scope_exit, METH_FASTCALL, NULL},
    {NULL},
};

static PyMemberDef scope_members[] = {
    {"group", T_OBJECT, offsetof(Scope, group), READONLY, NULL},
    {NULL},
};

static PyTypeObject Scope_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "membound_async.allocator._tracker.Scope",
    .tp_basicsize = sizeof(Scope),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = scope_new,
    .tp_dealloc = (destructor)scope_dealloc,
    .tp_methods = scope_methods,
    .tp_members = scope_members,
};

/* --------------------------------------------------------------------------------- module */

static PyObject *
tracker_install(PyObject *Py_UNUSED(module), PyObject *arg)
{
    int wide = PyObject_IsTrue(arg);
    if (wide < 0)
        return NULL;
    if (!installed) {
#ifdef MADV_NOHUGEPAGE
        uintptr_t page = 4096, start = ((uintptr_t)directory + page - 1) & ~(page - 1);
        madvise((void *)start, ((uintptr_t)directory + sizeof directory - start) & ~(page - 1),
                MADV_NOHUGEPAGE);
#endif
        is_wide = wide;
        most_groups = wide ? WIDE_GROUPS : NARROW_GROUPS;
        enabled = true;
        for (int domain = 0; domain < DOMAINS; domain++) {
            PyMem_GetAllocator(domain, &originals[domain]);
            set_hooks(domain);
        }
        installed = true;
    }
    Py_RETURN_NONE;
}

static PyObject *
tracker_switch(PyObject *Py_UNUSED(module), PyObject *arg)
{
    int on = PyObject_IsTrue(arg);
    if (on < 0)
        return NULL;
    switch_counting(on);
    Py_RETURN_NONE;
}

static PyObject *
tracker_state(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    bool gone = false;
    for (int domain = 0; installed && domain < DOMAINS; domain++)
        gone = displaced(domain) || gone;
    return Py_BuildValue("{s:N,s:N,s:I,s:N,s:K,s:K,s:K}",
                         "installed", PyBool_FromLong(installed),
                         "enabled", PyBool_FromLong(enabled),
                         "groups", most_groups,
                         "displaced", PyBool_FromLong(gone),
                         "lost_blocks", (unsigned long long)lost_blocks,
                         "freed_unseen", (unsigned long long)freed_unseen,
                         "failed_lookups", (unsigned long long)failed_lookups);
}

static PyObject *
tracker_current(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    Token *token = current_token();
    if (token == NULL)
        return NULL;
    struct Group *group = slots[token->group].group;
    Py_DECREF(token);
    return Py_NewRef((PyObject *)(group != NULL ? group : slots[ROOT].group));
}

static PyObject *
tracker_hook_group(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return PyLong_FromUnsignedLong(current_group());
}

static PyObject *
tracker_block(PyObject *Py_UNUSED(module), PyObject *address)
{
    void *p = PyLong_AsVoidPtr(address);
    if (p == NULL && PyErr_Occurred())
        return NULL;
    char *entry = find_entry(is_wide, p, false);
    uint32_t value = look_at(is_wide, entry);
    if (value == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("In", entry_group(is_wide, value),
                         (Py_ssize_t)entry_size(is_wide, entry, value));
}

/* From here on the interpreter takes itself apart, and what that allocates is root's. */
static PyObject *
tracker_finalize(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    finalizing = true;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"install", tracker_install, METH_O, NULL},
    {"switch", tracker_switch, METH_O, NULL},
    {"state", tracker_state, METH_NOARGS, NULL},
    {"current", tracker_current, METH_NOARGS, NULL},
    {"_hook_group", tracker_hook_group, METH_NOARGS, NULL},
    {"_block", tracker_block, METH_O, NULL},
    {"_finalize", tracker_finalize, METH_NOARGS, NULL},
    {NULL},
};

#define HANDLE(generation, index) ((uint64_t)(generation) << 32 | (index))

static uint64_t
api_current(void)
{
    uint32_t group = current_group();
    return group == NONE ? 0 : HANDLE(slots[group].generation, group);
}

static bool
is_handle(uint64_t group)
{
    uint32_t index = (uint32_t)group;
    return group >> 32 != 0 && index <= MAX_GROUPS && slots[index].generation == group >> 32;
}

static int
api_charge(uint64_t group, size_t nbytes)
{
    return is_handle(group) ? charge((uint32_t)group, nbytes) : -1;
}

static int
api_discharge(uint64_t group, size_t nbytes)
{
    return is_handle(group) ? discharge((uint32_t)group, nbytes) : -1;
}

static membound_tracker_api api = {
    MEMBOUND_TRACKER_VERSION, api_current, api_charge, api_discharge,
};

static int
prepare(PyObject *module)
{
    main_interpreter = PyInterpreterState_Main();
    PyObject *exceptions = PyImport_ImportModule("membound_async.exceptions");
    if (exceptions == NULL)
        return -1;
    TrackingError = PyObject_GetAttrString(exceptions, "TrackingError");
    Py_DECREF(exceptions);
    PyObject *finalize = PyObject_GetAttrString(module, "_finalize");
    PyObject *atexit = PyImport_ImportModule("atexit");
    if (TrackingError == NULL || finalize == NULL || atexit == NULL)
        return -1;
    PyObject *registered = PyObject_CallMethod(atexit, "register", "N", finalize);
    Py_DECREF(atexit);
    if (registered == NULL)
        return -1;
    Py_DECREF(registered);
    variable = PyContextVar_New("membound_allocation_group", NULL);
    return variable == NULL ? -1 : 0;
}

static int
execute(PyObject *module)
{
    if (PyThreadState_Get()->interp != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "a subinterpreter: only the main one is tracked");
        return -1;
    }
    if (variable == NULL && prepare(module) < 0)
        return -1;
    if (PyType_Ready(&Token_Type) < 0 || PyModule_AddType(module, &Group_Type) < 0
        || PyModule_AddType(module, &Scope_Type) < 0)
        return -1;
    PyObject *capsule = PyCapsule_New(&api, MEMBOUND_TRACKER_CAPSULE, NULL);
    if (capsule == NULL || PyModule_AddObjectRef(module, "_C_API", capsule) < 0) {
        Py_XDECREF(capsule);
        return -1;
    }
    Py_DECREF(capsule);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, execute},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "membound_async.allocator._tracker",
    .m_doc = PyDoc_STR("Which group's code has allocated what; see membound_async.allocator."),
    .m_methods = methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC
PyInit__tracker(void)
{
    return PyModuleDef_Init(&definition);
}

#endif
