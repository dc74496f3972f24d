/* Groups, their slots, and what is counted for each. */

enum { NONE, ROOT };          /* what an entry says of a block that is not counted; of root's */
#define NARROW_GROUPS 126     /* besides root, with 7 bits */
#define WIDE_GROUPS 65535     /* with 17 bits */

/* Of blocks of the MEM and OBJ domains. */
typedef struct {
    uint64_t allocated_bytes, allocated_objects, deallocated_bytes, deallocated_objects;
    int64_t elsewhere;      /* live bytes in shared_counts, as last seen with the GIL */
    int64_t peak_bytes;     /* the most that was live, elsewhere included, less elsewhere */
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

/* Those of the first groups; install() has room made for more, if more are wanted. */
static counts_t first_counts[ROOT + NARROW_GROUPS + 1];
static shared_counts_t first_shared_counts[ROOT + NARROW_GROUPS + 1];
static slot_t first_slots[ROOT + NARROW_GROUPS + 1];

static PyInterpreterState *main_interpreter;
static counts_t *counts = first_counts;
static shared_counts_t *shared_counts = first_shared_counts;
static slot_t *slots = first_slots;
static uint32_t used_slots = NONE;   /* those beyond were never used */
static uint32_t next_slot = ROOT;    /* where the search for a retired one goes on */
static uint32_t most_groups = NARROW_GROUPS;

/* Memory of zeros, which is there as soon as it is touched; NULL: there is none. */
static void *
map(size_t n, int protection)
{
    void *start = mmap(NULL, n, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
#ifdef MADV_NOHUGEPAGE
    madvise(start, n, MADV_NOHUGEPAGE);
#endif
    return start;
}

static bool
map_counts(void)
{
    size_t n = ROOT + WIDE_GROUPS + 1, used = used_slots + 1;
    counts_t *more = map(n * sizeof *counts, PROT_READ | PROT_WRITE);
    shared_counts_t *more_shared = map(n * sizeof *shared_counts, PROT_READ | PROT_WRITE);
    slot_t *more_slots = map(n * sizeof *slots, PROT_READ | PROT_WRITE);
    if (more == NULL || more_shared == NULL || more_slots == NULL)
        return false;
    counts = memcpy(more, counts, used * sizeof *counts);
    shared_counts = memcpy(more_shared, shared_counts, used * sizeof *shared_counts);
    slots = memcpy(more_slots, slots, used * sizeof *slots);
    most_groups = WIDE_GROUPS;
    return true;
}

INLINE void
count_allocated(counts_t *c, size_t n)
{
    c->allocated_bytes += n;
    c->allocated_objects++;
    int64_t live = (int64_t)(c->allocated_bytes - c->deallocated_bytes);
    if (live > c->peak_bytes)
        c->peak_bytes = live;
}

INLINE void
count_deallocated(counts_t *c, size_t n)
{
    c->deallocated_bytes += n;
    c->deallocated_objects++;
}

/* Brings `elsewhere` and the peak up to date; with the GIL. */
static void
look_elsewhere(uint32_t group)
{
    counts_t *c = &counts[group];
    uint64_t freed = shared_counts[group].deallocated_bytes;   /* first: never below 0 */
    int64_t elsewhere = (int64_t)(shared_counts[group].allocated_bytes - freed);
    int64_t live = (int64_t)(c->allocated_bytes - c->deallocated_bytes);
    c->peak_bytes += c->elsewhere - elsewhere;
    c->elsewhere = elsewhere;
    if (live > c->peak_bytes)
        c->peak_bytes = live;
}

static void
count_allocated_shared(shared_counts_t *c, size_t n)
{
    atomic_fetch_add_explicit(&c->allocated_bytes, n, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->allocated_objects, 1, memory_order_relaxed);
}

static void
count_deallocated_shared(shared_counts_t *c, size_t n)
{
    atomic_fetch_add_explicit(&c->deallocated_objects, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->deallocated_bytes, n, memory_order_relaxed);
}

/* What was counted for the group that has the slot; with the GIL. */
static counts_t
total(uint32_t group)
{
    look_elsewhere(group);
    counts_t sum = counts[group], *before = &slots[group].before;
    shared_counts_t *shared = &shared_counts[group];
    sum.peak_bytes += sum.elsewhere;
    sum.deallocated_bytes += shared->deallocated_bytes - before->deallocated_bytes;
    sum.deallocated_objects += shared->deallocated_objects - before->deallocated_objects;
    sum.allocated_bytes += shared->allocated_bytes - before->allocated_bytes;
    sum.allocated_objects += shared->allocated_objects - before->allocated_objects;
    return sum;
}
