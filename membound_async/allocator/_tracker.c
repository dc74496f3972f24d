/* _tracker: which group's code has allocated what, for every block of CPython's allocators.
 *
 * Hooks in the three allocator domains charge a block to the group whose context made it, and
 * credit that group when the block is freed, by whomever. Each part is a file of its own; here
 * are groups and scopes as Python sees them. Figures and choices: docs/topics/tracking.md.
 *
 *     _counts.h    what is counted for each group
 *     _shadow.h    an entry for each block outside the heap: whose it is, and how large
 *     _current.h   the group to charge: the context's
 *     _heap.h      where small blocks come from, each with its entry, in place of pymalloc
 *     _hooks.h     malloc, calloc, realloc and free of each domain
 *     _numpy.h     the same for the data of NumPy's arrays
 *
 * Invariants
 *
 * 1. A block is counted iff it has an entry: it is written after the block is had and cleared
 *    before it is given back. So a block that is unknown (from before install(), or made while
 *    counting was off) needs no care anywhere. What comes from the heap is always counted.
 * 2. Entries of addresses inside a block name no group: a stale one is never taken for a block.
 * 3. Plain counters, `current` and the heap are touched with the GIL of the main interpreter
 *    held only, atomic counters and the shadow by everybody.
 * 4. Without the GIL no Python object is touched. With it, only resolve() touches any, and what
 *    that might allocate is not counted, because `here.busy` is set.
 * 5. `here.busy` is set while another allocator or NumPy is called, so that what it takes from
 *    the raw domain in its turn is counted once.
 * 6. Hooks keep the original's ctx and ignore it: an allocator that is read while it is being
 *    set works, whichever of its functions are there already.
 * 7. Scope alone writes the context variable, and says so to `current` before and after:
 *    setting a variable does not change the version of its context.
 * 8. With the heap, a counted block of the MEM and OBJ domains that is not in it has come from
 *    the raw domain's original. Blocks that are not counted are the domain's original's.
 * 9. A slot is used again only when nothing charged to it is live and no context names it.
 */
#define PY_SSIZE_T_CLEAN
#include <patchlevel.h>
#if PY_VERSION_HEX < 0x030C0000
#define Py_BUILD_CORE_MODULE   /* for the thread state */
#endif
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
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "membound_tracker.h"

#if PY_VERSION_HEX < 0x030C0000
/* A sixth of what counting costs is a call here, of a function that reads one word. */
#include <internal/pycore_runtime.h>
#define thread_state()                                                                           \
    ((PyThreadState *)__atomic_load_n(&_PyRuntime.gilstate.tstate_current._value,                \
                                      __ATOMIC_RELAXED))
#elif PY_VERSION_HEX < 0x030D0000
#define thread_state() _PyThreadState_UncheckedGet()
#else
#define thread_state() PyThreadState_GetUnchecked()
#endif

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define INLINE static inline __attribute__((always_inline))
#define COLD static __attribute__((cold, noinline))

#include "_counts.h"
#include "_shadow.h"
#include "_current.h"
#include "_heap.h"
#include "_hooks.h"
#include "_numpy.h"

/* --------------------------------------------------------------------- groups, for Python */

static PyObject *TrackingError;
static PyTypeObject Group_Type;

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
    Token *token = PyObject_New(Token, &Token_Type);
    if (token == NULL)
        return NULL;
    Group *self = (Group *)type->tp_alloc(type, 0);
    /* Only now: allocating may have run finalizers, and these may have taken slots. */
    uint32_t index = self == NULL ? NONE : find_slot();
    if (index == NONE) {
        if (self != NULL)
            PyErr_Format(TrackingError,
                         "no group for %R: all %u are in use, or have memory that is still "
                         "live or tasks that are still in them; unregister some%s",
                         path, most_groups,
                         most_groups < WIDE_GROUPS ? ", or use install(groups=65535)" : "");
        Py_DECREF(token);
        Py_XDECREF(self);
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
        counts[index].peak_bytes = -counts[index].elsewhere;
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
    return self->index == NONE || slots[self->index].generation != self->generation;
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
    release_unwanted_pages();   /* who reads this reads it from time to time */
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

/* Chunks of the heap are large; where what is mapped is limited, they would be counted whole. */
static bool
is_unlimited(int resource)
{
    struct rlimit limit;
    return getrlimit(resource, &limit) == 0 && limit.rlim_cur == RLIM_INFINITY;
}

extern const char *_PyMem_GetCurrentAllocatorName(void);   /* NULL: of no known one */

static PyObject *
tracker_install(PyObject *Py_UNUSED(module), PyObject *arg)
{
    int wide = PyObject_IsTrue(arg);
    if (wide < 0)
        return NULL;
    if (!installed) {
        if ((directory == NULL && !map_directory()) || (wide && !map_counts()))
            return PyErr_NoMemory();
        is_wide = wide;
        enabled = true;
        const char *name = _PyMem_GetCurrentAllocatorName();
        has_heap = name != NULL && strcmp(name, "pymalloc") == 0
                   && is_unlimited(RLIMIT_AS) && is_unlimited(RLIMIT_DATA);
        for (int i = 0; i < CLASSES; i++)
            pages[i] = &no_page;
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
    return Py_BuildValue("{s:N,s:N,s:I,s:N,s:K,s:K,s:K,s:K}",
                         "installed", PyBool_FromLong(installed),
                         "enabled", PyBool_FromLong(enabled),
                         "groups", most_groups,
                         "displaced", PyBool_FromLong(gone),
                         "lost_blocks", (unsigned long long)lost_blocks,
                         "freed_unseen", (unsigned long long)freed_unseen,
                         "failed_lookups", (unsigned long long)failed_lookups,
                         "heap_bytes", (unsigned long long)((page_count + spare_count) * PAGE));
}

static PyObject *
tracker_trim(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    size_t n = spare_count;
    release_pages(n);
    return PyLong_FromSize_t(n * PAGE);
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
    bool small = in_heap(p);
    char *entry = small ? block_entry(is_wide, page_of(p), p) : find_entry(is_wide, p, false);
    uint32_t value = look_at(is_wide, entry);
    if (value == 0)
        Py_RETURN_NONE;
    size_t size = small ? (value & LARGE(is_wide)) + 1 : entry_size(is_wide, entry, value);
    return Py_BuildValue("In", entry_group(is_wide, value), (Py_ssize_t)size);
}

/* From here on the interpreter takes itself apart, and what that allocates is root's. */
static PyObject *
tracker_finalize(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    finalizing = true;
    current.thread = NOBODY;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"install", tracker_install, METH_O, NULL},
    {"switch", tracker_switch, METH_O, NULL},
    {"state", tracker_state, METH_NOARGS, NULL},
    {"trim", tracker_trim, METH_NOARGS, NULL},
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
    return group >> 32 != 0 && index <= ROOT + most_groups && slots[index].generation == group >> 32;
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
    if (thread_state() != PyThreadState_Get()) {
        PyErr_SetString(PyExc_ImportError, "built for another Python: the thread state is not "
                                           "where it was then; build it anew");
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
