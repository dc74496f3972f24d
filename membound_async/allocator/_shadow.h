/* The shadow of the address space: of each block, whose it is and how large. */

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
#define ENTRY_SHIFT(wide) ((wide) ? 2 : 1)   /* of the bytes of an entry */
#define SHADOW_SHIFT(wide) (4 - ENTRY_SHIFT(wide))
#define DIRECTORY_SIZE ((size_t)1 << (ADDRESS_BITS - LEAF_BITS))
#define LEAF_BYTES(wide) (((size_t)1 << (LEAF_BITS - SHADOW_SHIFT(wide))) + 4096)

/* Where the entry of address 0 would be, as seen from each leaf; 0: there is none; HEAP: the
 * addresses are the heap's own. */
#define HEAP 1
static _Atomic uintptr_t *directory;   /* NULL before install() */
static _Atomic uint64_t lost_blocks;   /* not counted for want of a leaf or an aligned address */
static _Atomic uint64_t freed_unseen;  /* freed by another than the hooks, found out later */
static bool is_wide;

/* Only what is written to counts for RLIMIT_DATA, so only that may be written to. */
static bool
map_directory(void)
{
    directory = map(DIRECTORY_SIZE * sizeof *directory, PROT_READ);
    return directory != NULL;
}

COLD bool
may_write(_Atomic uintptr_t *place)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    return mprotect((void *)((uintptr_t)place & ~(page - 1)), page, PROT_READ | PROT_WRITE) == 0;
}

COLD uintptr_t
map_leaf(bool wide, uintptr_t address)
{
    size_t index = address >> LEAF_BITS;
    void *leaf = map(LEAF_BYTES(wide), PROT_READ | PROT_WRITE);
    if (leaf == NULL)
        return 0;
#ifdef MADV_DONTDUMP
    madvise(leaf, LEAF_BYTES(wide), MADV_DONTDUMP);
#endif
    uintptr_t origin = (uintptr_t)leaf - ((index << LEAF_BITS) >> SHADOW_SHIFT(wide));
    uintptr_t others = 0;
    if (may_write(&directory[index])
        && atomic_compare_exchange_strong(&directory[index], &others, origin))
        return origin;
    munmap(leaf, LEAF_BYTES(wide));
    return others;
}

/* What the directory says of an address; 0 of one that cannot have an entry. */
INLINE uintptr_t
find_origin(const void *p)
{
    uintptr_t address = (uintptr_t)p;
    if (UNLIKELY(address & UNTRACKABLE))
        return 0;
    return atomic_load_explicit(&directory[address >> LEAF_BITS], memory_order_relaxed);
}

INLINE char *
entry_at(bool wide, uintptr_t origin, const void *p)
{
    return (char *)(origin + ((uintptr_t)p >> SHADOW_SHIFT(wide)));
}

/* The entry of an address; NULL if it has none, unless `make`. */
INLINE char *
find_entry(bool wide, const void *p, bool make)
{
    uintptr_t origin = find_origin(p);
    if (UNLIKELY(origin <= HEAP)) {
        if (origin == HEAP || !make || (uintptr_t)p & UNTRACKABLE)
            return NULL;
        origin = map_leaf(wide, (uintptr_t)p);
        if (origin == 0)
            return NULL;
    }
    return entry_at(wide, origin, p);
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

INLINE void
count_freed(bool shared, uint32_t group, size_t n)
{
    if (!shared)
        count_deallocated(&counts[group], n);
    else {
        count_deallocated_shared(&shared_counts[group], n);
        if (has_gil())
            look_elsewhere(group);   /* or the next peak would have it still */
    }
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
        count_freed(shared, entry_group(wide, stale), entry_size(wide, entry, stale));
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
    if (!shared)
        count_allocated(&counts[group], n);
    else {
        count_allocated_shared(&shared_counts[group], n);
        if (has_gil())
            look_elsewhere(group);   /* what is freed soon counts for the peak */
    }
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
    count_freed(shared, entry_group(wide, value), entry_size(wide, entry, value));
}
