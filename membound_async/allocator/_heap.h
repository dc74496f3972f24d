/* A heap for small blocks, which knows of each whose it is and how large.
 *
 * Where pymalloc is the original, small blocks of the MEM and OBJ domains come from here: to
 * serve them costs less than to put a hook around pymalloc, and hooking has undone already what
 * made that fast, being compiled into its callers. Everything here needs the GIL.
 *
 * A page has blocks of one size. Blocks lie at multiples of their size, so that an address gives
 * a block's number by one multiplication; their entries are those of the shadow, in the order of
 * these numbers, after the page's head. Pages that are empty are kept as long as they are wanted
 * now and then, and else given back to the system one by one: memory returns that pymalloc
 * would keep until a whole mebibyte is empty.
 */
#define SMALL 512
#define CLASSES (SMALL / GRANULE)
#define PAGE ((size_t)1 << 14)
#define CHUNK ((size_t)1 << LEAF_BITS)
#define CHUNK_PAGES (CHUNK / PAGE)
#define BATCH 8            /* blocks that are made at a time */
#define EPOCH_SECONDS 1    /* empty pages that nobody wanted for so long go back to the system */

typedef struct block {
    struct block *next;
} block_t;

typedef struct page {
    block_t *free;
    uint32_t reciprocal;   /* 2**32 / size of a block */
    uint32_t used;
    uint32_t notice;       /* page_changed() is to hear of it when so many are used */
    uint32_t made;         /* the number of the next block to be made */
    uint32_t size_class;
    struct page *next, *previous;
} __attribute__((aligned(64))) page_t;

typedef struct chunk {
    struct chunk *next;
    uint32_t fresh, released;   /* pages that were never used; that the system has again */
    uint16_t released_pages[CHUNK_PAGES];
} chunk_t;

static page_t no_page;               /* ends each list, and has no block to give */
static page_t *pages[CLASSES];       /* that have a free block or may make one */
static page_t *spare_pages;
static size_t spare_count, page_count;
static size_t unwanted_count;        /* the least that were spare in this epoch */
static time_t epoch;
static chunk_t *chunks;

INLINE bool
in_heap(const void *p)
{
    return find_origin(p) == HEAP;
}

INLINE page_t *
page_of(const void *p)
{
    return (page_t *)((uintptr_t)p & ~(PAGE - 1));
}

INLINE size_t
block_size(const page_t *page)
{
    return (page->size_class + 1) * GRANULE;
}

INLINE char *
block_entry(bool wide, page_t *page, const void *p)
{
    uint64_t number = ((uintptr_t)p & (PAGE - 1)) * page->reciprocal >> 32;
    return (char *)(page + 1) + (number << ENTRY_SHIFT(wide));
}

COLD bool
map_chunk(void)
{
    char *start = map(2 * CHUNK, PROT_READ | PROT_WRITE);
    if (start == NULL)
        return false;
    char *aligned = (char *)(((uintptr_t)start + CHUNK - 1) & ~(CHUNK - 1));
    if (aligned > start)
        munmap(start, (size_t)(aligned - start));
    munmap(aligned + CHUNK, (size_t)(start + CHUNK - aligned));
    size_t index = (uintptr_t)aligned >> LEAF_BITS;
    if (index >= DIRECTORY_SIZE || !may_write(&directory[index])) {
        munmap(aligned, CHUNK);
        return false;
    }
    chunk_t *chunk = (chunk_t *)aligned;
    chunk->next = chunks;
    chunk->fresh = CHUNK_PAGES - 1;
    chunks = chunk;
    atomic_store(&directory[index], HEAP);   /* a leaf of what was there earlier has no use now */
    return true;
}

COLD page_t *
take_page(void)
{
    page_t *page = spare_pages;
    if (page != NULL) {
        spare_pages = page->next;
        if (--spare_count < unwanted_count)
            unwanted_count = spare_count;
    }
    for (chunk_t *chunk = chunks; page == NULL; chunk = chunk->next) {
        if (chunk == NULL) {
            if (!map_chunk())
                return NULL;
            chunk = chunks;
        }
        if (chunk->released > 0)
            page = (page_t *)((char *)chunk + PAGE * chunk->released_pages[--chunk->released]);
        else if (chunk->fresh > 0)
            page = (page_t *)((char *)chunk + PAGE * chunk->fresh--);
    }
    page_count++;
    return page;
}

/* Gives so many empty pages back to the system. */
COLD void
release_pages(size_t n)
{
    for (; n > 0; n--) {
        page_t *page = spare_pages;
        spare_pages = page->next;
        spare_count--;
        chunk_t *chunk = (chunk_t *)((uintptr_t)page & ~(CHUNK - 1));
        chunk->released_pages[chunk->released++] = (uint16_t)(((char *)page - (char *)chunk) / PAGE);
        madvise(page, PAGE, MADV_DONTNEED);
    }
    unwanted_count = spare_count;
}

/* The same with those that nobody wanted, once an epoch. */
static void
release_unwanted_pages(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    if (now.tv_sec - epoch > EPOCH_SECONDS) {
        epoch = now.tv_sec;
        release_pages(unwanted_count);
    }
}

COLD void
give_page(page_t *page)
{
    page->next = spare_pages;
    spare_pages = page;
    spare_count++;
    page_count--;
    release_unwanted_pages();
}

static void
link_page(page_t *page)
{
    page_t **first = &pages[page->size_class];
    page->previous = &no_page;
    page->next = *first;
    page->next->previous = page;
    *first = page;
}

static void
unlink_page(page_t *page)
{
    page->next->previous = page->previous;
    if (page->previous == &no_page)
        pages[page->size_class] = page->next;
    else
        page->previous->next = page->next;
}

/* Makes blocks where the first page of a class has none that is free; false: no memory. */
COLD bool
make_blocks(bool wide, uint32_t size_class)
{
    size_t size = (size_class + 1) * GRANULE, end = PAGE / size;
    page_t *page = pages[size_class];
    while (page != &no_page && page->free == NULL && page->made == end) {
        unlink_page(page);
        page->notice = page->used - 1;
        page = pages[size_class];
    }
    if (page == &no_page) {
        page = take_page();
        if (page == NULL)
            return false;
        size_t head = sizeof(page_t) + (end << ENTRY_SHIFT(wide));
        page->free = NULL;
        page->reciprocal = (uint32_t)((((uint64_t)1 << 32) + size - 1) / size);
        page->used = page->notice = 0;
        page->made = (uint32_t)((head + size - 1) / size);
        page->size_class = size_class;
        link_page(page);
    }
    for (int i = 0; page->free == NULL || (i < BATCH && page->made < end); i++) {
        block_t *block = (block_t *)((char *)page + size * page->made++);
        block->next = page->free;
        page->free = block;
    }
    return true;
}

/* All pages of a class were full when one block of this one was freed; or it is empty now. */
COLD void
page_changed(page_t *page)
{
    if (page->notice != 0) {
        page->notice = 0;
        link_page(page);
    }
    else if (page->next != &no_page || page->previous != &no_page) {
        unlink_page(page);
        give_page(page);
    }
}

/* A block of 1 to SMALL bytes, from the free blocks of its class's first page; NULL: make some. */
INLINE void *
take_block(bool wide, size_t n, uint32_t code)
{
    page_t *page = pages[(n - 1) / GRANULE];
    block_t *block = page->free;
    if (UNLIKELY(block == NULL))
        return NULL;
    page->free = block->next;
    page->used++;
    store(wide, block_entry(wide, page, block), 0, code | (uint32_t)(n - 1));
    return block;
}

INLINE void
give_block(page_t *page, void *p)
{
    block_t *block = p;
    block->next = page->free;
    page->free = block;
    if (UNLIKELY(--page->used == page->notice))
        page_changed(page);
}
