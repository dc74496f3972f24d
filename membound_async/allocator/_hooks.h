/* The hooks themselves: around another allocator, or in front of the heap. */

#define DOMAINS 3   /* PYMEM_DOMAIN_RAW, _MEM, _OBJ */
static PyMemAllocatorEx originals[DOMAINS];
static bool installed, has_heap;

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
    if (LIKELY(value != 0))
        count_freed(IS_SHARED(domain), entry_group(wide, value), old_n);
    if (LIKELY(group != NONE))
        note(wide, IS_SHARED(domain), q, n, group);
    return q;
}

/* With the heap: a block of the MEM and OBJ domains that is counted comes from it if it is small,
 * else right from the raw domain's original, where pymalloc would get it. */
static __attribute__((noinline)) void *
heap_malloc_slowly(bool wide, int domain, size_t n)
{
    PyMemAllocatorEx *original = &originals[domain], *raw = &originals[PYMEM_DOMAIN_RAW];
    uint32_t group = enabled && !here.busy ? current_group() : NONE;
    if (group == NONE) {
        bool was_busy = here.busy;
        here.busy = true;
        void *p = original->malloc(original->ctx, n);
        here.busy = was_busy;
        return p;
    }
    n += n == 0;
    if (n <= SMALL && (pages[(n - 1) / GRANULE]->free != NULL
                       || make_blocks(wide, (uint32_t)(n - 1) / GRANULE))) {
        count_allocated(&counts[group], n);
        return take_block(wide, n, group << CODE_BITS(wide));
    }
    void *p = raw->malloc(raw->ctx, A_GRANULE(n));
    if (LIKELY(p != NULL))
        note(wide, false, p, n, group);
    return p;
}

INLINE void *
heap_malloc(bool wide, int domain, size_t n)
{
    if (LIKELY(n - 1 < SMALL && is_current())) {
        void *p = take_block(wide, n, current.code);
        if (LIKELY(p != NULL)) {
            count_allocated(current.counts, n);
            return p;
        }
    }
    return heap_malloc_slowly(wide, domain, n);
}

INLINE void *
heap_calloc(bool wide, int domain, size_t count, size_t size)
{
    size_t n = count * size;
    if (n <= SMALL) {
        void *p = heap_malloc(wide, domain, n);
        return p == NULL ? NULL : memset(p, 0, n);
    }
    PyMemAllocatorEx *raw = &originals[PYMEM_DOMAIN_RAW];
    uint32_t group = enabled && !here.busy ? current_group() : NONE;
    bool was_busy = here.busy;
    here.busy = true;
    void *p = raw->calloc(raw->ctx, count, size);
    here.busy = was_busy;
    if (LIKELY(p != NULL && group != NONE))
        note(wide, false, p, n, group);
    return p;
}

static __attribute__((noinline)) void
heap_free_large(bool wide, void *p)
{
    PyMemAllocatorEx *raw = &originals[PYMEM_DOMAIN_RAW];
    char *entry = find_entry(wide, p, false);
    count_taken(wide, false, entry, take_entry(wide, entry));
    raw->free(raw->ctx, p);
}

INLINE void
heap_free(bool wide, int domain, void *p)
{
    uintptr_t origin = find_origin(p);
    if (LIKELY(origin == HEAP)) {
        page_t *page = page_of(p);
        char *entry = block_entry(wide, page, p);
        uint32_t value = load(wide, entry, 0);
        store(wide, entry, 0, 0);
        count_deallocated(&counts[entry_group(wide, value)], (value & LARGE(wide)) + 1);
        give_block(page, p);
    }
    else if (origin != 0 && look_at(wide, entry_at(wide, origin, p)) != 0)
        heap_free_large(wide, p);
    else
        originals[domain].free(originals[domain].ctx, p);
}

/* Moves a block to where one of its new size belongs. */
static void *
heap_move(bool wide, int domain, void *p, size_t old_n, size_t n)
{
    void *q = heap_malloc(wide, domain, n);
    if (q == NULL)
        return NULL;
    memcpy(q, p, n < old_n ? n : old_n);
    heap_free(wide, domain, p);
    return q;
}

static void *
heap_realloc(bool wide, int domain, void *p, size_t n)
{
    if (p == NULL)
        return heap_malloc(wide, domain, n);
    PyMemAllocatorEx *original = &originals[domain], *raw = &originals[PYMEM_DOMAIN_RAW];
    uint32_t group = enabled && !here.busy ? current_group() : NONE;
    n += n == 0;
    if (in_heap(p)) {
        page_t *page = page_of(p);
        char *entry = block_entry(wide, page, p);
        uint32_t value = load(wide, entry, 0);
        size_t old_n = (value & LARGE(wide)) + 1, size = block_size(page);
        if (group == NONE || n > size || 4 * n <= 3 * size)
            return heap_move(wide, domain, p, old_n, n);
        count_deallocated(&counts[entry_group(wide, value)], old_n);
        count_allocated(&counts[group], n);
        store(wide, entry, 0, group << CODE_BITS(wide) | (uint32_t)(n - 1));
        return p;
    }
    char *entry = find_entry(wide, p, false);
    uint32_t value = look_at(wide, entry);
    bool was_busy = here.busy;
    if (value == 0) {
        /* The original's. What is large now has come from the raw domain, as is all that is
         * counted outside the heap. */
        here.busy = true;
        void *q = original->realloc(original->ctx, p, n);
        here.busy = was_busy;
        if (q == NULL || group == NONE)
            return q;
        if (n <= SMALL) {
            void *moved = heap_malloc(wide, domain, n);
            if (moved == NULL)
                return q;
            memcpy(moved, q, n);
            original->free(original->ctx, q);
            return moved;
        }
        note(wide, false, q, n, group);
        return q;
    }
    size_t old_n = entry_size(wide, entry, value);
    if (n <= SMALL && group != NONE)
        return heap_move(wide, domain, p, old_n, n);
    store(wide, entry, 0, 0);
    void *q = raw->realloc(raw->ctx, p, A_GRANULE(n));
    if (UNLIKELY(q == NULL)) {
        store(wide, entry, 0, value);
        return NULL;
    }
    count_freed(false, entry_group(wide, value), old_n);
    if (LIKELY(group != NONE))
        note(wide, false, q, n, group);
    return q;
}

#define HOOKS(name, how, wide, domain)                                                           \
    static void *name##_malloc(void *Py_UNUSED(ctx), size_t n)                                   \
    { return how##_malloc(wide, domain, n); }                                                    \
    static void *name##_calloc(void *Py_UNUSED(ctx), size_t count, size_t size)                  \
    { return how##_calloc(wide, domain, count, size); }                                          \
    static void *name##_realloc(void *Py_UNUSED(ctx), void *p, size_t n)                         \
    { return how##_realloc(wide, domain, p, n); }                                                \
    static void name##_free(void *Py_UNUSED(ctx), void *p)                                       \
    { how##_free(wide, domain, p); }

HOOKS(narrow_raw, tracked, false, PYMEM_DOMAIN_RAW)
HOOKS(narrow_mem, tracked, false, PYMEM_DOMAIN_MEM)
HOOKS(narrow_obj, tracked, false, PYMEM_DOMAIN_OBJ)
HOOKS(narrow_heap_mem, heap, false, PYMEM_DOMAIN_MEM)
HOOKS(narrow_heap_obj, heap, false, PYMEM_DOMAIN_OBJ)
HOOKS(wide_raw, tracked, true, PYMEM_DOMAIN_RAW)
HOOKS(wide_mem, tracked, true, PYMEM_DOMAIN_MEM)
HOOKS(wide_obj, tracked, true, PYMEM_DOMAIN_OBJ)
HOOKS(wide_heap_mem, heap, true, PYMEM_DOMAIN_MEM)
HOOKS(wide_heap_obj, heap, true, PYMEM_DOMAIN_OBJ)

#define HOOK(name) {NULL, name##_malloc, name##_calloc, name##_realloc, name##_free}
static const PyMemAllocatorEx all_hooks[2][2][DOMAINS] = {   /* by is_wide, has_heap */
    {{HOOK(narrow_raw), HOOK(narrow_mem), HOOK(narrow_obj)},
     {HOOK(narrow_raw), HOOK(narrow_heap_mem), HOOK(narrow_heap_obj)}},
    {{HOOK(wide_raw), HOOK(wide_mem), HOOK(wide_obj)},
     {HOOK(wide_raw), HOOK(wide_heap_mem), HOOK(wide_heap_obj)}},
};
#define hooks all_hooks[is_wide][has_heap]

/* Whether a domain's allocator is this one, so that it may be set without harm to others. */
static bool
on_top(int domain)
{
    PyMemAllocatorEx now;
    PyMem_GetAllocator(domain, &now);
    return now.free == hooks[domain].free;
}

/* Sets the hooks. While counting is off, blocks come straight from the original, and only what
 * is freed is looked at. */
static void
set_hooks(int domain)
{
    PyMemAllocatorEx hook = hooks[domain];
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
    current.thread = NOBODY;
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
    current.thread = NOBODY;
    return group != NONE && !counted;
}
