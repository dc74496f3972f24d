/* NumPy's data, by a handler as NEP 49 has it. */

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
    if (group != NONE)
        is_wide ? note(true, true, p, n, group) : note(false, true, p, n, group);
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
        count_freed(true, entry_group(is_wide, value), old_n);
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
