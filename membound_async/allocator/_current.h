/* Which group is charged: the one that the context variable names. */

static PyObject *variable;                    /* the ContextVar; never freed */
static bool finalizing;
static uint64_t failed_lookups;
static PyTypeObject Token_Type;

typedef struct {
    PyObject_HEAD
    uint32_t group;
} Token;

static bool enabled;   /* whether what is allocated is counted now */

/* What the thread that has the GIL charges, and the state of its context that this is true for.
 * Other interpreters with a GIL of their own look at it, but find another's thread. While
 * counting is off it is nobody's, so that who finds his own need not look at `enabled`. */
#define NOBODY ((PyThreadState *)1)
static struct {
    PyThreadState *thread;
    uint64_t thread_id, context_version;
    uint32_t code;       /* the group, as an entry has it */
    counts_t *counts;
} current = {.thread = NOBODY};

/* The group that this thread has charged last; and whether what is called now is not counted. */
static __thread struct {
    uint32_t group, generation;
    bool busy;
} here
#ifdef __GLIBC__
    __attribute__((tls_model("initial-exec")))
#endif
    ;

INLINE void
remember(PyThreadState *thread, uint32_t group)
{
    current.thread = enabled ? thread : NOBODY;
    current.thread_id = thread->id;
    current.context_version = thread->context_ver;
    current.code = group << CODE_BITS(is_wide);
    current.counts = &counts[group];
    here.group = group;
    here.generation = slots[group].generation;
}

/* The group that a context variable names; errors mean root. */
static uint32_t
look_up(void)
{
    PyObject *value = NULL;
    if (PyContextVar_Get(variable, NULL, &value) < 0) {
        failed_lookups++;   /* at the recursion limit, for one */
        PyErr_Clear();
    }
    if (value == NULL)
        return ROOT;
    uint32_t group = Py_IS_TYPE(value, &Token_Type) ? ((Token *)value)->group : ROOT;
    Py_DECREF(value);   /* the context has another reference */
    return group;
}

/* Looks up the group of the current context, and keeps a pending exception. */
COLD uint32_t
resolve(PyThreadState *thread)
{
    if (thread == NULL)
        return ROOT;
    uint32_t group = ROOT;
    bool is_main = thread->interp == main_interpreter;
    if (!is_main && PY_VERSION_HEX >= 0x030C0000)
        return here.group = NONE;   /* it may have a GIL of its own */
    here.busy = true;
    if (is_main && thread->context != NULL && !finalizing) {
#if PY_VERSION_HEX >= 0x030C0000
        PyObject *pending = thread->current_exception;
        thread->current_exception = NULL;
        group = look_up();
        thread->current_exception = pending;
#else
        if (LIKELY(thread->curexc_type == NULL))
            group = look_up();
        else {
            PyObject *pending, *value, *traceback;
            PyErr_Fetch(&pending, &value, &traceback);
            group = look_up();
            PyErr_Restore(pending, value, traceback);
        }
#endif
    }
    remember(thread, group);
    here.busy = false;
    return group;
}

/* Whether `current` is of now; with the GIL. */
INLINE bool
is_current(void)
{
    PyThreadState *thread = thread_state();
    return LIKELY(thread == current.thread && thread->id == current.thread_id
                  && thread->context_ver == current.context_version);
}

INLINE uint32_t
current_group(void)
{
    return is_current() ? current.code >> CODE_BITS(is_wide) : resolve(thread_state());
}

/* Without the GIL: the group that the thread charged last, if it is still there. */
static uint32_t
last_group(void)
{
    uint32_t group = here.group;
    return group != NONE && slots[group].generation == here.generation ? group : ROOT;
}
