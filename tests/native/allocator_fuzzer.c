/* Drives the tracker's hooks by random operations, beside a model of what they must count.
 *
 *     observer     sees every call, of the interpreter as of the fuzzer, and keeps the model
 *     the hooks    what is tested
 *     stage        puts a block where it is told to, or fails when it is told to
 *     the interpreter's allocators
 *
 * Above pymalloc itself the hooks have a heap of their own; that is tested without the stage.
 *
 * The observer is put in by the call that installs the hooks, so the model knows each block
 * that they know of. It does not know how they work: it has a table of blocks by address, and
 * is told by the fuzzer which group is current. After each operation the counters of all the
 * groups that were touched and what the tracker says of the block are compared; to read them,
 * the observer goes past the hooks, so that looking changes nothing.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define DOMAINS 3
extern const char *_PyMem_GetCurrentAllocatorName(void);
static PyMemAllocatorEx originals[DOMAINS];   /* below the stage */
static PyMemAllocatorEx hooks[DOMAINS];       /* below the observer */
static PyObject *tracker;

static uint64_t random_state = 1;

static uint64_t
random64(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545F4914F6CDD1D;
}

static uint64_t
below(uint64_t n)
{
    return random64() % n;
}

static bool
one_in(uint64_t n)
{
    return below(n) == 0;
}

/* -------------------------------------------------------------------------------- the model */

#define MAX_INDEX 65536
#define MAX_BLOCKS ((size_t)1 << 19)

typedef struct {
    PyObject *group;   /* NULL: nobody has it any more */
    uint32_t index;
    bool retired, changed;
    int named;         /* by so many contexts and scopes */
    uint64_t allocated_bytes, allocated_objects, deallocated_bytes, deallocated_objects;
    uint64_t charged;
    int64_t peak;
} group_t;

typedef struct {
    uintptr_t address;
    size_t size;
    group_t *owner;
} block_t;

static block_t blocks[MAX_BLOCKS];
static size_t known_blocks;
static group_t *by_index[MAX_INDEX + 1];
static group_t *current;
static bool counting;
static group_t *changed[MAX_INDEX];
static size_t changed_count;

static size_t
home(uintptr_t address)
{
    return (address >> 3) * 0x9E3779B97F4A7C15 >> 45;
}

static block_t *
find_block(const void *p)
{
    size_t i = home((uintptr_t)p);
    while (blocks[i].address != 0 && blocks[i].address != (uintptr_t)p)
        i = (i + 1) % MAX_BLOCKS;
    return &blocks[i];
}

static void
touch(group_t *group)
{
    if (!group->changed) {
        group->changed = true;
        changed[changed_count++] = group;
    }
}

static int64_t
live_bytes(const group_t *group)
{
    return (int64_t)(group->allocated_bytes - group->deallocated_bytes);
}

static void
grown(group_t *group)
{
    if (live_bytes(group) > group->peak)
        group->peak = live_bytes(group);
    touch(group);
}

static void
model_freed(const void *p)
{
    block_t *block = find_block(p);
    if (block->address == 0)
        return;
    block->owner->deallocated_bytes += block->size;
    block->owner->deallocated_objects++;
    touch(block->owner);
    known_blocks--;
    size_t hole = block - blocks, i = hole;
    for (;;) {   /* what would not be found any more moves into the hole */
        i = (i + 1) % MAX_BLOCKS;
        if (blocks[i].address == 0)
            break;
        size_t wanted = home(blocks[i].address);
        if ((i - wanted) % MAX_BLOCKS >= (i - hole) % MAX_BLOCKS) {
            blocks[hole] = blocks[i];
            hole = i;
        }
    }
    blocks[hole].address = 0;
}

static void
model_allocated(const void *p, size_t n)
{
    if (!counting)
        return;
    model_freed(p);   /* behind the hooks' back, if at all */
    if (++known_blocks > MAX_BLOCKS / 2)
        Py_FatalError("too many blocks for the model");
    *find_block(p) = (block_t){(uintptr_t)p, n == 0 ? 1 : n, current};
    current->allocated_bytes += n == 0 ? 1 : n;
    current->allocated_objects++;
    grown(current);
}

/* ----------------------------------------------------------------------------- the observer */

#define SMALL 512      /* what pymalloc and the tracker's heap make */
static bool staged, has_heap;
static int depth;      /* of hooks that are being called: what they call is not counted */
static bool looking;   /* past the hooks */

#define DOMAIN(ctx) ((int)(intptr_t)(ctx))

static void *
observer_malloc(void *ctx, size_t n)
{
    PyMemAllocatorEx *next = looking ? &originals[DOMAIN(ctx)] : &hooks[DOMAIN(ctx)];
    depth++;
    void *p = next->malloc(next->ctx, n);
    depth--;
    if (p != NULL && depth == 0 && !looking)
        model_allocated(p, n);
    return p;
}

static void *
observer_calloc(void *ctx, size_t count, size_t size)
{
    PyMemAllocatorEx *next = looking ? &originals[DOMAIN(ctx)] : &hooks[DOMAIN(ctx)];
    depth++;
    void *p = next->calloc(next->ctx, count, size);
    depth--;
    if (p != NULL && depth == 0 && !looking)
        model_allocated(p, count * size);
    return p;
}

static void *
observer_realloc(void *ctx, void *p, size_t n)
{
    PyMemAllocatorEx *next = looking ? &originals[DOMAIN(ctx)] : &hooks[DOMAIN(ctx)];
    depth++;
    void *q = next->realloc(next->ctx, p, n);
    depth--;
    if (q != NULL && depth == 0 && !looking) {
        /* In the heap, a block that moves is there twice for a moment, and the peak shows it. */
        bool twice = has_heap && DOMAIN(ctx) != 0 && q != p
                     && (n <= SMALL || find_block(p)->size <= SMALL);
        if (p != NULL && !twice)
            model_freed(p);
        model_allocated(q, n);
        if (p != NULL && twice)
            model_freed(p);
    }
    return q;
}

static void
observer_free(void *ctx, void *p)
{
    PyMemAllocatorEx *next = looking ? &originals[DOMAIN(ctx)] : &hooks[DOMAIN(ctx)];
    if (p != NULL && depth == 0) {
        if (!looking)
            model_freed(p);
        else if (find_block(p)->address != 0)
            Py_FatalError("a block that is counted is freed by looking");
    }
    depth++;
    next->free(next->ctx, p);
    depth--;
}

static void
observe(void)
{
    for (intptr_t domain = 0; domain < DOMAINS; domain++) {
        PyMem_GetAllocator(domain, &hooks[domain]);
        PyMemAllocatorEx observer = {(void *)domain, observer_malloc, observer_calloc,
                                     observer_realloc, observer_free};
        PyMem_SetAllocator(domain, &observer);
    }
}

static void
observe_no_more(void)
{
    for (int domain = 0; domain < DOMAINS; domain++)
        PyMem_SetAllocator(domain, &hooks[domain]);
}

/* -------------------------------------------------------------------------------- the stage */

#define LEAF ((uintptr_t)1 << 26)
#define GRANULE 16
#define ARENA_GRANULES ((size_t)1 << 13)   /* 64 KiB on either side of a leaf's boundary */

static char *arena;
static bool taken[ARENA_GRANULES];
static size_t arena_sizes[ARENA_GRANULES];
static char *place;        /* where the next block is put, if it fits */
static bool fail_next;

static bool
in_arena(const void *p)
{
    return (char *)p >= arena && (char *)p < arena + ARENA_GRANULES * GRANULE;
}

/* A place in the arena for n bytes, mostly near the boundary; NULL: none was found. */
static char *
find_place(size_t n)
{
    size_t granules = (n + GRANULE - 1) / GRANULE;
    granules += granules == 0;
    for (int attempt = 0; attempt < 8; attempt++) {
        size_t at = one_in(2) ? below(ARENA_GRANULES) : ARENA_GRANULES / 2 - 8 + below(12);
        size_t i = 0;
        while (i < granules && at + i < ARENA_GRANULES && !taken[at + i])
            i++;
        if (i == granules)
            return arena + at * GRANULE;
    }
    return NULL;
}

static void
set_taken(char *p, bool value)
{
    size_t at = (p - arena) / GRANULE, granules = (arena_sizes[at] + GRANULE - 1) / GRANULE;
    memset(&taken[at], value, granules + (granules == 0));
}

static void *
stage_malloc(void *ctx, size_t n)
{
    if (fail_next) {
        fail_next = false;
        return NULL;
    }
    if (place != NULL) {
        char *p = place;
        place = NULL;
        arena_sizes[(p - arena) / GRANULE] = n;
        set_taken(p, true);
        return p;
    }
    PyMemAllocatorEx *original = &originals[DOMAIN(ctx)];
    return original->malloc(original->ctx, n);
}

static void *
stage_calloc(void *ctx, size_t count, size_t size)
{
    if (fail_next || place != NULL) {
        void *p = stage_malloc(ctx, count * size);
        return p == NULL ? NULL : memset(p, 0, count * size);
    }
    PyMemAllocatorEx *original = &originals[DOMAIN(ctx)];
    return original->calloc(original->ctx, count, size);
}

static void
stage_free(void *ctx, void *p)
{
    if (in_arena(p)) {
        set_taken(p, false);
        return;
    }
    PyMemAllocatorEx *original = &originals[DOMAIN(ctx)];
    original->free(original->ctx, p);
}

static void *
stage_realloc(void *ctx, void *p, size_t n)
{
    if (p == NULL || fail_next)
        return stage_malloc(ctx, n);
    if (in_arena(p)) {
        size_t old_n = arena_sizes[((char *)p - arena) / GRANULE];
        void *q = stage_malloc(ctx, n);
        if (q != NULL) {
            memcpy(q, p, old_n < n ? old_n : n);
            set_taken(p, false);
        }
        return q;
    }
    place = NULL;
    PyMemAllocatorEx *original = &originals[DOMAIN(ctx)];
    return original->realloc(original->ctx, p, n);
}

/* ------------------------------------------------------------------------------- comparing */

/* Made once: the interpreter's cache of methods would free those of a moment at any time. */
static PyObject *counts_name, *block_name, *enter_name, *exit_name, *retire_name, *charge_name,
                *discharge_name, *switch_name, *index_name;
static PyObject *scope_type, *group_type;
static PyObject *tracking_error;
static const char *doing = "";   /* the operation, for whom it fails */

static int
differs(const char *what, const group_t *group, long long expected, long long got)
{
    looking = false;
    PyErr_Format(PyExc_AssertionError, "after %s: %s of group %u: expected %lld, not %lld", doing,
                 what, group == NULL ? 0 : group->index, expected, got);
    return -1;
}

static int
check_group(group_t *group)
{
    if (group->group == NULL)
        return 0;
    looking = true;
    PyObject *counts = PyObject_CallMethodNoArgs(group->group, counts_name);
    if (counts == NULL)
        return -1;
    static const char *const names[] = {"allocated_bytes", "allocated_objects",
                                        "deallocated_bytes", "deallocated_objects", "peak"};
    const long long expected[] = {group->allocated_bytes, group->allocated_objects,
                                  group->deallocated_bytes, group->deallocated_objects,
                                  group->peak};
    for (int i = 0; i < 5; i++) {
        long long got = PyLong_AsLongLong(PyTuple_GET_ITEM(counts, i));
        if (got != expected[i]) {
            Py_DECREF(counts);
            return differs(names[i], group, expected[i], got);
        }
    }
    Py_DECREF(counts);
    looking = false;
    return 0;
}

static int
check_all_groups(void)
{
    for (size_t i = 0; i <= MAX_INDEX; i++)
        if (by_index[i] != NULL && check_group(by_index[i]) < 0)
            return -1;
    return 0;
}

static int
check_changed_groups(void)
{
    while (changed_count > 0) {
        group_t *group = changed[--changed_count];
        group->changed = false;
        if (check_group(group) < 0)
            return -1;
    }
    return 0;
}

/* What the tracker says of an address is what the model knows. */
static int
check_block(const void *p)
{
    block_t *block = find_block(p);
    looking = true;
    PyObject *address = PyLong_FromVoidPtr((void *)p);
    PyObject *said = PyObject_CallMethodOneArg(tracker, block_name, address);
    Py_DECREF(address);
    if (said == NULL)
        return -1;
    long long index = 0, size = 0;
    if (said != Py_None) {
        index = PyLong_AsLongLong(PyTuple_GET_ITEM(said, 0));
        index = index == 0 ? -1 : index;
        size = PyLong_AsLongLong(PyTuple_GET_ITEM(said, 1));
    }
    Py_DECREF(said);
    looking = false;
    if (block->address == 0)
        return index == 0 ? 0 : differs("owner of no block", NULL, 0, index);
    if (index != block->owner->index)
        return differs("owner of a block", block->owner, block->owner->index, index);
    if (size != (long long)block->size)
        return differs("size of a block", block->owner, block->size, size);
    return 0;
}

/* ----------------------------------------------------------- operations on groups and scopes */

#define MAX_SCOPES 6
#define MAX_CONTEXTS 8

typedef struct {
    PyObject *context;   /* NULL: not made yet, or the thread's own */
    group_t *base;
    struct { PyObject *scope; group_t *group; } scopes[MAX_SCOPES];
    int depth;
} context_t;

static context_t contexts[MAX_CONTEXTS];
static int here;         /* the context that is entered; 0: the thread's own */
static group_t *all[MAX_INDEX + 1];   /* that are registered, the root first */
static size_t all_count;
static uint32_t most_groups, used_indexes;
static bool watched_switching;   /* counting was switched off below the observer */

static group_t *
group_of(const context_t *context)
{
    return context->depth > 0 ? context->scopes[context->depth - 1].group : context->base;
}

/* 0: an error as it was expected. */
static int
expect_error(const char *why)
{
    if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_AssertionError, "%s: no error", why);
        return -1;
    }
    if (!PyErr_ExceptionMatches(tracking_error))
        return -1;
    PyErr_Clear();
    return 0;
}

static int
enter_group(void)
{
    context_t *context = &contexts[here];
    if (context->depth == MAX_SCOPES)
        return 0;
    group_t *group = all[below(all_count)];
    bool gone = one_in(50);
    if (gone) {
        group = by_index[1 + below(used_indexes)];
        gone = group->retired;
        if (group->group == NULL)
            return 0;
    }
    PyObject *scope = PyObject_CallOneArg(scope_type, group->group);
    if (scope == NULL)
        return -1;
    PyObject *result = PyObject_CallMethodNoArgs(scope, enter_name);
    if (gone) {
        Py_XDECREF(result);
        Py_DECREF(scope);
        return expect_error("entering an unregistered group");
    }
    if (result == NULL)
        return -1;
    current = group;
    Py_DECREF(result);
    context->scopes[context->depth].scope = scope;
    context->scopes[context->depth++].group = group;
    group->named++;
    return 0;
}

static int
leave_group(void)
{
    context_t *context = &contexts[here];
    if (context->depth == 0)
        return 0;
    if (context->depth > 1 && one_in(20)) {   /* out of order: nothing changes */
        PyObject *outer = context->scopes[context->depth - 2].scope;
        if (group_of(context) != context->scopes[context->depth - 2].group) {
            Py_XDECREF(PyObject_CallMethodNoArgs(outer, exit_name));
            return expect_error("leaving out of order");
        }
    }
    PyObject *scope = context->scopes[--context->depth].scope;
    context->scopes[context->depth].group->named--;
    current = group_of(context);
    PyObject *result = PyObject_CallMethodNoArgs(scope, exit_name);
    Py_DECREF(scope);
    if (result == NULL)
        return -1;
    Py_DECREF(result);
    return 0;
}

static void
forget_context(context_t *context)
{
    while (context->depth > 0) {
        context->scopes[--context->depth].group->named--;
        Py_DECREF(context->scopes[context->depth].scope);
    }
    context->base->named--;
    Py_CLEAR(context->context);
}

static int
switch_context(void)
{
    int to = (int)below(MAX_CONTEXTS);
    context_t *context = &contexts[to];
    if (to == here)
        return 0;
    if (to != 0 && context->context != NULL && one_in(4))
        forget_context(context);
    if (to != 0 && context->context == NULL) {
        context->context = PyContext_CopyCurrent();
        context->base = current;
        current->named++;
    }
    if (here != 0 && PyContext_Exit(contexts[here].context) < 0)
        return -1;
    current = group_of(&contexts[0]);
    here = to;
    if (here != 0 && PyContext_Enter(contexts[here].context) < 0)
        return -1;
    current = group_of(context);
    return 0;
}

static bool
is_drained(const group_t *group)
{
    return group->retired && group->named == 0 && live_bytes(group) == 0
           && group->allocated_objects == group->deallocated_objects;
}

/* A slot is used again only if nothing of the group that had it is left. */
static int
register_group(void)
{
    static int number;
    PyObject *path = PyUnicode_FromFormat("g%d", number++);
    PyObject *made = PyObject_CallOneArg(group_type, path);
    Py_DECREF(path);
    if (made == NULL) {
        if (used_indexes < 1 + most_groups)
            return -1;
        for (uint32_t i = 2; i <= used_indexes; i++)
            if (is_drained(by_index[i]))
                return differs("slot that could be used", by_index[i], 0, 0);
        return expect_error("registering one too many");
    }
    PyObject *value = PyObject_GetAttr(made, index_name);
    uint32_t index = (uint32_t)PyLong_AsUnsignedLong(value);
    Py_DECREF(value);
    group_t *old = by_index[index];
    if (index > used_indexes)
        used_indexes = index;
    if (old != NULL) {
        if (!is_drained(old))
            return differs("slot that is in use", old, 0, index);
        if (old->group != NULL) {
            PyObject *counts = PyObject_CallMethodNoArgs(old->group, counts_name);
            Py_XDECREF(counts);
            if (expect_error("counts of a group whose slot has another") < 0)
                return -1;
            PyObject *gone = old->group;
            old->group = NULL;
            Py_DECREF(gone);
        }
        if (check_changed_groups() < 0)
            return -1;
        free(old);
    }
    group_t *group = calloc(1, sizeof *group);
    group->group = made;
    group->index = index;
    by_index[index] = all[all_count++] = group;
    return 0;
}

static int
unregister_group(void)
{
    if (all_count < 2)
        return 0;
    size_t i = 1 + below(all_count - 1);
    group_t *group = all[i];
    all[i] = all[--all_count];
    group->retired = true;
    if (one_in(2)) {   /* by forgetting it */
        PyObject *object = group->group;
        group->group = NULL;
        Py_DECREF(object);
        return 0;
    }
    PyObject *result = PyObject_CallMethodNoArgs(group->group, retire_name);
    if (result == NULL)
        return -1;
    Py_DECREF(result);
    return 0;
}

static int
charge_group(void)
{
    group_t *group = all[below(all_count)];
    bool more = one_in(2);
    uint64_t n = below(one_in(2) ? 1000 : (uint64_t)1 << 40);
    if (!more && !one_in(10))
        n = below(group->charged + 1);
    PyObject *number = PyLong_FromUnsignedLongLong(n);
    PyObject *result = PyObject_CallMethodOneArg(group->group,
                                                 more ? charge_name : discharge_name, number);
    if (result != NULL && more) {
        group->charged += n;
        group->allocated_bytes += n;
        grown(group);
    }
    else if (result != NULL) {
        group->charged -= n;
        group->deallocated_bytes += n;
        touch(group);
    }
    Py_DECREF(number);
    Py_XDECREF(result);
    if (!more && group->charged + (result == NULL ? 0 : n) < n)
        return expect_error("discharging too much");
    return result == NULL ? -1 : 0;
}

/* Below the observer, which hides that the hooks are there; or with them on top, so that they
 * may be exchanged. On again as off, for the observer goes on to call those that it found. */
static int
switch_counting(bool on)
{
    bool watched = on ? watched_switching : one_in(2);
    watched_switching = watched;
    if (!watched)
        observe_no_more();
    PyObject *result = PyObject_CallMethodOneArg(tracker, switch_name, on ? Py_True : Py_False);
    if (!watched)
        observe();
    if (result == NULL)
        return -1;
    Py_DECREF(result);
    counting = on;
    return 0;
}

/* ------------------------------------------------------------------------ operations on blocks */

typedef struct {
    unsigned char *p;
    size_t n;
    int domain;
    uint8_t seed;
} slot_t;

#define SLOTS 4096
static slot_t slots[SLOTS];

static void *
malloc_in(int domain, size_t n)
{
    return domain == 0 ? PyMem_RawMalloc(n) : domain == 1 ? PyMem_Malloc(n) : PyObject_Malloc(n);
}

static void *
calloc_in(int domain, size_t count, size_t n)
{
    return domain == 0 ? PyMem_RawCalloc(count, n)
           : domain == 1 ? PyMem_Calloc(count, n) : PyObject_Calloc(count, n);
}

static void *
realloc_in(int domain, void *p, size_t n)
{
    return domain == 0 ? PyMem_RawRealloc(p, n)
           : domain == 1 ? PyMem_Realloc(p, n) : PyObject_Realloc(p, n);
}

static void
free_in(int domain, void *p)
{
    domain == 0 ? PyMem_RawFree(p) : domain == 1 ? PyMem_Free(p) : PyObject_Free(p);
}

static size_t
random_size(void)
{
    uint64_t r = below(2000);
    return one_in(8000) ? below((uint64_t)80 << 20)
           : r < 50 ? below(256 << 10)
           : r < 200 ? 32760 + below(16)
           : r < 400 ? below(5000)
           : r < 650 ? 505 + below(16)
           : r < 1200 ? below(600) : below(17);
}

/* The bytes of a block that are written and compared: the first, the last, and one between. */
#define EDGE 32

static void
fill(const slot_t *slot)
{
    for (size_t i = 0; i < slot->n; i++) {
        if (i == EDGE && slot->n > 3 * EDGE) {
            slot->p[slot->n / 2] = (uint8_t)(slot->seed ^ slot->n / 2);
            i = slot->n - EDGE;
        }
        slot->p[i] = (uint8_t)(slot->seed ^ i);
    }
}

/* That what was written into a block of `slot->n` bytes is still in the first `n` of it. */
static int
check_content(const slot_t *slot, size_t n)
{
    for (size_t i = 0; i < slot->n && i < n; i++) {
        if (i == EDGE && slot->n > 3 * EDGE) {
            size_t middle = slot->n / 2;
            if (middle < n && slot->p[middle] != (uint8_t)(slot->seed ^ middle))
                return differs("content in the middle", NULL, slot->seed ^ middle, slot->p[middle]);
            i = slot->n - EDGE;
            if (i >= n)
                return 0;
        }
        if (slot->p[i] != (uint8_t)(slot->seed ^ i))
            return differs("content", NULL, (uint8_t)(slot->seed ^ i), slot->p[i]);
    }
    return 0;
}

static int
check_zeroed(const slot_t *slot)
{
    for (size_t i = 0; i < slot->n; i += i < 5000 ? 1 : 99991)
        if (slot->p[i] != 0)
            return differs("content of calloc", NULL, 0, slot->p[i]);
    return 0;
}

/* Has this thread be known to charge the current group, and gives the GIL away if the domain
 * may do without. */
static PyThreadState *
maybe_without_gil(int domain)
{
    if (domain != 0 || !one_in(4))
        return NULL;
    PyMem_Free(PyMem_Malloc(1));
    return PyEval_SaveThread();
}

static void
with_gil_again(PyThreadState *thread)
{
    if (thread != NULL)
        PyEval_RestoreThread(thread);
}

/* Whether an allocation is to fail, and how: of too much, or by the stage. */
static bool
choose_failure(size_t *n)
{
    if (!one_in(200))
        return false;
    fail_next = staged && one_in(2);
    if (!fail_next)
        *n = (size_t)PY_SSIZE_T_MAX - below(100) + below(50);
    return true;
}

static int
allocate(slot_t *slot)
{
    slot->domain = (int)below(DOMAINS);
    slot->seed = (uint8_t)random64();
    int how = (int)below(3);
    doing = how == 0 ? "malloc" : how == 1 ? "calloc" : "realloc(NULL)";
    PyThreadState *thread = maybe_without_gil(slot->domain);
    size_t n = random_size();
    bool failing = choose_failure(&n);
    if (staged && !failing && n < 50000 && one_in(3))
        place = find_place(n < GRANULE ? GRANULE : n);
    void *p = how == 0 ? malloc_in(slot->domain, n)
              : how == 1 ? n % 8 ? calloc_in(slot->domain, 1, n) : calloc_in(slot->domain, n / 8, 8)
              : realloc_in(slot->domain, NULL, n);
    with_gil_again(thread);
    fail_next = false;
    place = NULL;
    if (failing)
        return p == NULL ? 0 : differs("failing", NULL, 0, 1);
    if (p == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    slot->p = p;
    slot->n = n;
    if (how == 1 && check_zeroed(slot) < 0)
        return -1;
    fill(slot);
    /* In the heap, an address inside a block is that block's. */
    if (!has_heap && n > 2 * GRANULE && ((uintptr_t)p & (GRANULE - 1)) == 0
        && check_block(slot->p + GRANULE * (1 + below(n / GRANULE - 1))) < 0)
        return -1;
    return check_block(p);
}

static int
release(slot_t *slot)
{
    doing = "free";
    if (check_content(slot, slot->n) < 0 || check_block(slot->p) < 0)
        return -1;
    PyThreadState *thread = maybe_without_gil(slot->domain);
    free_in(slot->domain, slot->p);
    with_gil_again(thread);
    void *p = slot->p;
    slot->p = NULL;
    return check_block(p);
}

static int
resize(slot_t *slot)
{
    PyThreadState *thread = maybe_without_gil(slot->domain);
    size_t n = one_in(2) ? slot->n + below(64) : random_size();
    bool failing = choose_failure(&n);
    if (!failing && n < 50000 && in_arena(slot->p) && one_in(2))
        place = find_place(n < GRANULE ? GRANULE : n);
    doing = failing ? "a failing realloc" : "realloc";
    void *q = realloc_in(slot->domain, slot->p, n);
    with_gil_again(thread);
    fail_next = false;
    place = NULL;
    if (failing) {
        if (q != NULL)
            return differs("failing", NULL, 0, 1);
        return check_content(slot, slot->n) < 0 || check_block(slot->p) < 0 ? -1 : 0;
    }
    if (q == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    void *p = slot->p;
    slot->p = q;
    if (check_content(slot, n) < 0)
        return -1;
    slot->n = n;
    fill(slot);
    return check_block(p) < 0 || check_block(q) < 0 ? -1 : 0;
}

/* The block is freed where the hooks do not see it; they find out when its address is used. */
static int
release_unseen(slot_t *slot)
{
    if (!counting || !in_arena(slot->p))
        return 0;
    doing = "malloc of what was freed unseen";
    stage_free(NULL, slot->p);
    place = (char *)slot->p;
    slot->n = slot->n == 0 ? 0 : below(slot->n);
    slot->domain = (int)below(DOMAINS);
    slot->p = malloc_in(slot->domain, slot->n);
    fill(slot);
    return check_block(slot->p);
}

/* ------------------------------------------------------------------------------ the fuzzer */

static int
operate(void)
{
    uint64_t r = below(1000);
    if (r < 900) {
        slot_t *slot = &slots[below(SLOTS)];
        if (slot->p == NULL)
            return allocate(slot);
        r = below(1000);
        return r < 550 ? release(slot) : r < 995 ? resize(slot) : release_unseen(slot);
    }
#define OPERATION(chance, name, call) if (r < (chance)) { doing = name; return call; }
    OPERATION(937, "entering", enter_group())
    OPERATION(973, "leaving", leave_group())
    OPERATION(983, "switching the context", switch_context())
    OPERATION(988, "registering", register_group())
    OPERATION(992, "unregistering", unregister_group())
    OPERATION(996, "charging", charge_group())
    if (r < 998) {
        doing = "free(NULL)";
        free_in((int)below(DOMAINS), NULL);
    }
    else if (!counting || one_in(4)) {
        doing = "switching";
        return switch_counting(!counting);
    }
    return 0;
}

static PyObject *
fuzz(PyObject *Py_UNUSED(module), PyObject *args)
{
    long long operations;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "LK", &operations, &seed))
        return NULL;
    random_state = seed * 2 + 1;
    for (int i = 0; i < 20; i++)
        random64();
    uint32_t every = 1024 + 8 * most_groups;
    for (long long i = 0; i < operations; i++) {
        if (operate() < 0 || check_changed_groups() < 0
            || (i % every == 0 && check_all_groups() < 0))
            return NULL;
        if (depth != 0 || fail_next || place != NULL)
            Py_FatalError("the fuzzer has lost its way");
    }
    if (check_all_groups() < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Frees all blocks, leaves all groups: what is live then was allocated by the interpreter. */
static PyObject *
finish(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    if (here != 0 && PyContext_Exit(contexts[here].context) < 0)
        return NULL;
    here = 0;
    current = group_of(&contexts[0]);
    for (int i = 1; i < MAX_CONTEXTS; i++)
        if (contexts[i].context != NULL)
            forget_context(&contexts[i]);
    while (contexts[0].depth > 0)
        if (leave_group() < 0)
            return NULL;
    for (int i = 0; i < SLOTS; i++)
        if (slots[i].p != NULL && release(&slots[i]) < 0)
            return NULL;
    if (!counting && switch_counting(true) < 0)
        return NULL;
    if (check_all_groups() < 0)
        return NULL;
    return PyLong_FromSize_t(known_blocks);
}

/* Installs the stage, if it is wanted, the hooks and the observer. */
static PyObject *
begin(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *root;
    int wide, with_stage;
    if (!PyArg_ParseTuple(args, "OOppO", &tracker, &root, &wide, &with_stage, &tracking_error))
        return NULL;
    Py_INCREF(tracker);
    Py_INCREF(tracking_error);
    scope_type = PyObject_GetAttrString(tracker, "Scope");
    group_type = PyObject_GetAttrString(tracker, "Group");
    most_groups = wide ? 65535 : 126;
    used_indexes = 1;
    current = by_index[1] = all[all_count++] = calloc(1, sizeof *current);
    current->group = Py_NewRef(root);
    current->index = 1;
    contexts[0].base = current;
    staged = with_stage;
    const char *below_us = _PyMem_GetCurrentAllocatorName();
    has_heap = !staged && below_us != NULL && strcmp(below_us, "pymalloc") == 0;
    char *reserved = mmap(NULL, 2 * LEAF, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    arena = (char *)(((uintptr_t)reserved + LEAF) & ~(LEAF - 1)) - ARENA_GRANULES * GRANULE / 2;
    if (reserved == MAP_FAILED
        || mprotect(arena, ARENA_GRANULES * GRANULE, PROT_READ | PROT_WRITE) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    for (intptr_t domain = 0; domain < DOMAINS; domain++) {
        PyMem_GetAllocator(domain, &originals[domain]);
        if (!staged)
            continue;
        PyMemAllocatorEx stage = {(void *)domain, stage_malloc, stage_calloc, stage_realloc,
                                  stage_free};
        PyMem_SetAllocator(domain, &stage);
    }
    PyObject *result = PyObject_CallMethod(tracker, "install", "O", wide ? Py_True : Py_False);
    if (result == NULL)
        return NULL;
    counting = true;
    observe();
    return result;
}

/* Registers until there are so many groups. */
static PyObject *
register_groups(PyObject *Py_UNUSED(module), PyObject *number)
{
    size_t wanted = PyLong_AsSize_t(number);
    while (all_count < wanted)
        if (register_group() < 0)
            return NULL;
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------------- the stress */

#define THREADS 8
#define SHARED_BLOCKS 2048

typedef struct {
    uint32_t owner, domain;
    uint64_t size;
} header_t;

/* [0]: of the raw domain, from any thread; [1]: of the others, with the GIL. */
static _Atomic(header_t *) shared[2][SHARED_BLOCKS];
static _Atomic uint64_t tallies[THREADS][4];

static void
tally(uint32_t owner, int what, uint64_t bytes)
{
    tallies[owner][what] += bytes;
    tallies[owner][what + 1]++;
}

static header_t *
describe(header_t *block, uint32_t owner, uint32_t domain, size_t n)
{
    if (block == NULL)
        Py_FatalError("out of memory");
    *block = (header_t){owner, domain, n};
    ((char *)block)[n - 1] = (char)n;
    tally(owner, 0, n);
    return block;
}

static void
give_back(header_t *block)
{
    if (((char *)block)[block->size - 1] != (char)block->size)
        Py_FatalError("a block's content has changed");
    tally(block->owner, 2, block->size);
    free_in(block->domain, block);
}

static double
now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static uint64_t
stress_loop(uint32_t owner, bool raw, double seconds, uint64_t seed)
{
    uint64_t done = 0, x = seed * 2 + 1;
    for (double end = now() + seconds; done % 1024 != 0 || now() < end; done++) {
        x = x * 6364136223846793005 + 1442695040888963407;
        uint32_t r = (uint32_t)(x >> 33), domain = raw ? 0 : r % DOMAINS;
        size_t n = sizeof(header_t) + 1 + (r >> 2) % ((r >> 12) % 16 == 0 ? 40000 : 700);
        _Atomic(header_t *) *place = &shared[domain != 0][(r >> 16) % SHARED_BLOCKS];
        header_t *block = atomic_exchange(place, NULL);
        if (block == NULL)
            block = describe(malloc_in(domain, n), owner, domain, n);
        else if (r % 5 < 2) {
            header_t old = *block;
            block = realloc_in(old.domain, block, n);
            tally(old.owner, 2, old.size);
            describe(block, owner, old.domain, n);
        }
        else {
            give_back(block);
            block = NULL;
        }
        if (block != NULL && (block = atomic_exchange(place, block)) != NULL)
            give_back(block);
        if (!raw && done % 64 == 63) {
            Py_BEGIN_ALLOW_THREADS
            Py_END_ALLOW_THREADS
        }
    }
    return done;
}

/* stress(scope, owner, raw, seed, seconds): allocates, resizes and frees blocks that other threads
 * do the same with; with the GIL, which goes round, or without it. */
static PyObject *
stress(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *scope;
    unsigned owner, seed;
    int raw;
    double seconds;
    if (!PyArg_ParseTuple(args, "OIpId", &scope, &owner, &raw, &seed, &seconds))
        return NULL;
    PyObject *entered = PyObject_CallMethodNoArgs(scope, enter_name);
    if (entered == NULL)
        return NULL;
    Py_DECREF(entered);
    uint64_t done;
    if (raw) {
        Py_BEGIN_ALLOW_THREADS
        done = stress_loop(owner, true, seconds, seed);
        Py_END_ALLOW_THREADS
    }
    else
        done = stress_loop(owner, false, seconds, seed);
    PyObject *left = PyObject_CallMethodNoArgs(scope, exit_name);
    if (left == NULL)
        return NULL;
    Py_DECREF(left);
    return PyLong_FromUnsignedLongLong(done);
}

static PyObject *
stress_drain(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    for (int kind = 0; kind < 2; kind++)
        for (int i = 0; i < SHARED_BLOCKS; i++) {
            header_t *block = atomic_exchange(&shared[kind][i], NULL);
            if (block != NULL)
                give_back(block);
        }
    Py_RETURN_NONE;
}

/* What the threads have counted of their own: as `Group._counts()`, without the peak. */
static PyObject *
stress_tally(PyObject *Py_UNUSED(module), PyObject *owner)
{
    _Atomic uint64_t *t = tallies[PyLong_AsUnsignedLong(owner) % THREADS];
    return Py_BuildValue("KKKK", (unsigned long long)t[0], (unsigned long long)t[1],
                         (unsigned long long)t[2], (unsigned long long)t[3]);
}

/* ------------------------------------------------------------------- the state of the thread */

typedef struct {
    PyObject *function;
    int times;
    bool failed;
} foreign_t;

static void *
foreign_thread(void *arg)
{
    foreign_t *work = arg;
    for (int i = 0; i < work->times; i++) {
        PyMem_RawFree(PyMem_RawMalloc(100));   /* while there is no thread state */
        PyGILState_STATE state = PyGILState_Ensure();
        PyObject *result = PyObject_CallNoArgs(work->function);
        if (result == NULL) {
            PyErr_Print();
            work->failed = true;
        }
        Py_XDECREF(result);
        PyGILState_Release(state);
    }
    return NULL;
}

/* in_foreign_thread(function, times): each call has a thread state that is made for it. */
static PyObject *
in_foreign_thread(PyObject *Py_UNUSED(module), PyObject *args)
{
    foreign_t work = {0};
    pthread_t thread;
    if (!PyArg_ParseTuple(args, "Oi", &work.function, &work.times))
        return NULL;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = pthread_create(&thread, NULL, foreign_thread, &work);
    if (!failed)
        pthread_join(thread, NULL);
    Py_END_ALLOW_THREADS
    if (failed || work.failed)
        return PyErr_Format(PyExc_AssertionError, "a foreign thread's call has failed");
    Py_RETURN_NONE;
}

/* The group that the hooks charge for a block that is made in this context, 0 if none. */
static PyObject *
group_charged(PyObject *tracker, PyObject *context)
{
    if (PyContext_Enter(context) < 0)
        return NULL;
    void *p = PyMem_Malloc(100);
    PyObject *address = PyLong_FromVoidPtr(p);
    PyObject *said = PyObject_CallMethod(tracker, "_block", "O", address);
    PyMem_Free(p);
    Py_DECREF(address);
    if (PyContext_Exit(context) < 0 || said == NULL)
        return NULL;
    PyObject *index = said == Py_None ? PyLong_FromLong(0) : Py_NewRef(PyTuple_GET_ITEM(said, 0));
    Py_DECREF(said);
    return index;
}

/* while_raising(tracker, context, error): the same, with an error pending; that it still is. */
static PyObject *
while_raising(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *tracker, *context, *error;
    if (!PyArg_ParseTuple(args, "OOO", &tracker, &context, &error))
        return NULL;
    if (PyContext_Enter(context) < 0)
        return NULL;
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    void *p = PyMem_Malloc(100);
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    bool kept = value == error && type == (PyObject *)Py_TYPE(error) && traceback == NULL;
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    PyObject *said = PyObject_CallMethod(tracker, "_block", "N", PyLong_FromVoidPtr(p));
    PyMem_Free(p);
    if (PyContext_Exit(context) < 0 || said == NULL)
        return NULL;
    return Py_BuildValue("NN", PyBool_FromLong(kept), said);
}

/* at_the_limit(context): allocates there, where one call more would be too many; whether that
 * leaves no error behind. */
static PyObject *
at_the_limit(PyObject *Py_UNUSED(module), PyObject *context)
{
    int entered = 0;
    while (Py_EnterRecursiveCall("") == 0)
        entered++;
    PyErr_Clear();
    bool clean = PyContext_Enter(context) == 0;
    PyMem_Free(PyMem_Malloc(100));
    clean = clean && !PyErr_Occurred();
    PyErr_Clear();
    clean = PyContext_Exit(context) == 0 && clean;
    while (entered-- > 0)
        Py_LeaveRecursiveCall();
    return PyBool_FromLong(clean);
}

static PyObject *
charged_in(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *tracker, *context;
    if (!PyArg_ParseTuple(args, "OO", &tracker, &context))
        return NULL;
    return group_charged(tracker, context);
}

static PyMethodDef methods[] = {
    {"begin", begin, METH_VARARGS, NULL},
    {"register_groups", register_groups, METH_O, NULL},
    {"fuzz", fuzz, METH_VARARGS, NULL},
    {"finish", finish, METH_NOARGS, NULL},
    {"stress", stress, METH_VARARGS, NULL},
    {"stress_drain", stress_drain, METH_NOARGS, NULL},
    {"stress_tally", stress_tally, METH_O, NULL},
    {"in_foreign_thread", in_foreign_thread, METH_VARARGS, NULL},
    {"charged_in", charged_in, METH_VARARGS, NULL},
    {"while_raising", while_raising, METH_VARARGS, NULL},
    {"at_the_limit", at_the_limit, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "allocator_fuzzer", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC
PyInit_allocator_fuzzer(void)
{
    counts_name = PyUnicode_InternFromString("_counts");
    block_name = PyUnicode_InternFromString("_block");
    enter_name = PyUnicode_InternFromString("__enter__");
    exit_name = PyUnicode_InternFromString("__exit__");
    retire_name = PyUnicode_InternFromString("_retire");
    charge_name = PyUnicode_InternFromString("charge");
    discharge_name = PyUnicode_InternFromString("discharge");
    switch_name = PyUnicode_InternFromString("switch");
    index_name = PyUnicode_InternFromString("_index");
    return PyModule_Create(&definition);
}
