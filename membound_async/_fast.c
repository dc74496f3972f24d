/* The fast path of a grant in C: nobody ahead, no pressure, and room. fastpath.py says the same
 * in Python, and is what is used where this is not built.
 *
 *     async with component.grant(n): ...
 *
 * Here is the state that the fast path reads and writes, as C members with the names that the
 * Python classes over them use, and its two steps: take() and give_back(). What they cannot
 * settle at once is settled in Python, by MemoryGrant._acquire() and _release(): "no" is never
 * wrong here, only slower.
 *
 * What must hold:
 *
 * 1. take() and give_back() are atomic, for the GIL is held: from where they ask whether the
 *    limiter's lock is taken (is_open) until they have answered, they run no Python code,
 *    allocate nothing and let go of no reference. So they need no lock themselves.
 * 2. Python code changes the ledger, its accounts, its waiters and a held grant only with the
 *    limiter's lock taken, because it may lose the GIL in the middle. While it is taken,
 *    take() and give_back() say no.
 * 3. A grant is in the ring of a Holders only while it is held. The ring owns nothing: a grant
 *    leaves it when it is given back, when it is finalised, and at the latest when it is freed.
 * 4. No number overflows: a sum that may is checked, a product has 128 bits, and if it does
 *    not fit the answer is no; Python's integers settle it.
 * 5. A member may be set to anything in Python, so its type is looked at before it is used. Only
 *    a grant's `limiter` and `account` are what take() has put there.
 *
 * Types are static and what is looked up once is global, so the module is for the main
 * interpreter; and for builds with a GIL.
 */
#include <Python.h>
#include <structmember.h>

#include <stdbool.h>
#include <stddef.h>
#include <time.h>

#ifdef Py_GIL_DISABLED
#error "the fast path relies on the GIL; build with MEMBOUND_EXTENSION=no"
#endif

enum { NEW, ASKED, HELD, ALONE, RELEASED }; /* as in fastpath.py */

static long long max_bytes; /* membound_async.sizes.MAX_BYTES */
static PyObject *parse_size, *monotonic, *get_running_loop, *lock_type;
static PyObject *current_tasks; /* asyncio's, by loop; NULL where it has no such dict */
static PyObject *current_task;
static PyObject *str_account, *str_acquire, *str_admit, *str_enter, *str_limiter, *str_locked,
    *str_lost, *str_release;

/* --- state ------------------------------------------------------------------------------- */

/* Structs that refer to objects begin with all of them, so that one loop serves every type. */
#define OBJECTS(self) ((PyObject **)((char *)(self) + sizeof(PyObject)))

static int visit_objects(PyObject *self, int count, visitproc visit, void *arg)
{
    for (int i = 0; i < count; i++) {
        Py_VISIT(OBJECTS(self)[i]);
    }
    return 0;
}

static int clear_objects(PyObject *self, int count)
{
    for (int i = 0; i < count; i++) {
        Py_CLEAR(OBJECTS(self)[i]);
    }
    return 0;
}

#define COLLECTABLE(name, objects)                                                             \
    static int name##_traverse(PyObject *self, visitproc visit, void *arg)                     \
    {                                                                                          \
        return visit_objects(self, objects, visit, arg);                                       \
    }                                                                                          \
    static int name##_clear(PyObject *self) { return clear_objects(self, objects); }

/* A type that is nothing but state: what it is for, its Python class says. */
#define STATE(Name, name, objects)                                                             \
    COLLECTABLE(name, objects)                                                                 \
    static void name##_dealloc(PyObject *self)                                                 \
    {                                                                                          \
        PyObject_GC_UnTrack(self);                                                             \
        name##_clear(self);                                                                    \
        Py_TYPE(self)->tp_free(self);                                                          \
    }                                                                                          \
    static PyTypeObject Name##_Type = {                                                        \
        PyVarObject_HEAD_INIT(NULL, 0).tp_name = "membound_async._fast." #Name "State",        \
        .tp_basicsize = sizeof(Name),                                                          \
        .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,             \
        .tp_new = PyType_GenericNew,                                                           \
        .tp_traverse = name##_traverse,                                                        \
        .tp_clear = name##_clear,                                                              \
        .tp_dealloc = name##_dealloc,                                                          \
        .tp_members = name##_members,                                                          \
        .tp_getset = name##_getset,                                                            \
    };

#define HAS_TYPE(object, Name) ((object) != NULL && PyObject_TypeCheck(object, &Name##_Type))
#define MEMBER(Name, member, name, type) {name, type, offsetof(Name, member), 0, NULL}
#define OBJECT(Name, member, name) MEMBER(Name, member, name, T_OBJECT_EX)
#define BYTES(Name, member) MEMBER(Name, member, #member, T_LONGLONG)
#define SATURATED(Name, member)                                                                \
    {#member, get_saturated, set_saturated, NULL, (void *)offsetof(Name, member)}

/* A number that grows for ever, or a bound of one: it ends at the largest, and refuses none. */
static PyObject *get_saturated(PyObject *self, void *offset)
{
    return PyLong_FromLongLong(*(long long *)((char *)self + (size_t)offset));
}

static int set_saturated(PyObject *self, PyObject *value, void *offset)
{
    int overflow = 0;
    long long number = value == NULL ? -1 : PyLong_AsLongLongAndOverflow(value, &overflow);
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "cannot be deleted");
    }
    if (PyErr_Occurred()) {
        return -1;
    }
    *(long long *)((char *)self + (size_t)offset) = overflow > 0 ? LLONG_MAX : number;
    return 0;
}

typedef struct {
    PyObject_HEAD
    PyObject *queue, *holders;
    long long granted, live, in_flight, excess, reserved, peak, admissions, firm_limit;
    char grouped;
} Account;

static PyMemberDef account_members[] = {
    OBJECT(Account, queue, "queue"), OBJECT(Account, holders, "holders"),
    BYTES(Account, granted),         BYTES(Account, live),
    BYTES(Account, in_flight),       BYTES(Account, excess),
    BYTES(Account, reserved),        BYTES(Account, peak),
    BYTES(Account, admissions),      BYTES(Account, firm_limit),
    MEMBER(Account, grouped, "grouped", T_BOOL),
    {NULL},
};
static PyGetSetDef account_getset[] = {{NULL}};
STATE(Account, account, 2)

typedef struct {
    PyObject_HEAD
    long long count;
} Waiters;

static PyMemberDef waiters_members[] = {BYTES(Waiters, count), {NULL}};
static PyGetSetDef waiters_getset[] = {{NULL}};
STATE(Waiters, waiters, 0)

typedef struct {
    PyObject_HEAD
    PyObject *waiters, *p, *q; /* a share p/q of any integers */
    long long free, lowest_free, moved, look_at;
    char closed;
} Ledger;

static PyMemberDef ledger_members[] = {
    OBJECT(Ledger, waiters, "waiters"),
    OBJECT(Ledger, p, "_p"),
    OBJECT(Ledger, q, "_q"),
    BYTES(Ledger, free),
    MEMBER(Ledger, lowest_free, "_lowest_free", T_LONGLONG),
    MEMBER(Ledger, closed, "_closed", T_BOOL),
    {NULL},
};
static PyGetSetDef ledger_getset[] = {SATURATED(Ledger, moved), SATURATED(Ledger, look_at), {NULL}};
STATE(Ledger, ledger, 3)

typedef struct {
    PyObject_HEAD
    PyObject *lock, *ledger, *loop_token, *now;
    double calm_until;
} Limiter;

static PyMemberDef limiter_members[] = {
    OBJECT(Limiter, lock, "_lock"),
    OBJECT(Limiter, ledger, "_ledger"),
    OBJECT(Limiter, loop_token, "_loop_token"),
    OBJECT(Limiter, now, "_now"),
    MEMBER(Limiter, calm_until, "_calm_until", T_DOUBLE),
    {NULL},
};
static PyGetSetDef limiter_getset[] = {{NULL}};
STATE(Limiter, limiter, 4)

typedef struct Link {
    struct Link *before, *after; /* a ring; NULL in a grant that is in none */
} Link;

/* The grants that an account holds. */
typedef struct {
    PyObject_HEAD
    Link ring;
    long long count;
} Holders;

typedef struct {
    PyObject_HEAD
    PyObject *component, *options, *limiter, *account;
    PyObject *holder;   /* the task whose block it is */
    PyObject *weakrefs; /* not ours to visit */
    Link link;
    Holders *holders; /* whose ring it is in */
    long long wanted, size;
    double since;
    int state;
} Grant;

static PyTypeObject Grant_Type;

/* --- Holders: the grants that an account holds ------------------------------------------- */

static Grant *grant_of(Link *link)
{
    return (Grant *)((char *)link - offsetof(Grant, link));
}

static void take_out(Grant *grant)
{
    Link *link = &grant->link;
    if (link->before != NULL) {
        link->before->after = link->after;
        link->after->before = link->before;
        link->before = link->after = NULL;
        grant->holders->count--;
    }
}

static void put_in(Holders *holders, Grant *grant)
{
    Link *link = &grant->link, *ring = &holders->ring;
    take_out(grant);
    link->before = ring->before;
    link->after = ring;
    ring->before = ring->before->after = link;
    grant->holders = holders;
    holders->count++;
}

static PyObject *holders_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Holders *self = (Holders *)PyType_GenericNew(type, args, kwargs);
    if (self != NULL) {
        self->ring.before = self->ring.after = &self->ring;
    }
    return (PyObject *)self;
}

static void holders_dealloc(PyObject *self)
{
    Link *ring = &((Holders *)self)->ring;
    while (ring->after != ring) {
        take_out(grant_of(ring->after));
    }
    Py_TYPE(self)->tp_free(self);
}

static PyObject *holders_add(PyObject *self, PyObject *grant)
{
    if (!HAS_TYPE(grant, Grant)) {
        return PyErr_Format(PyExc_TypeError, "%R is no grant", grant);
    }
    put_in((Holders *)self, (Grant *)grant);
    Py_RETURN_NONE;
}

static PyObject *holders_discard(PyObject *Py_UNUSED(self), PyObject *grant)
{
    if (HAS_TYPE(grant, Grant)) {
        take_out((Grant *)grant);
    }
    Py_RETURN_NONE;
}

static PyObject *holders_snapshot(PyObject *self, PyObject *Py_UNUSED(unused))
{
    Link *ring = &((Holders *)self)->ring;
    /* Made before the first look: making it may collect garbage, with grants in it. */
    PyObject *found = PyList_New(0);
    for (Link *link = ring->after; found != NULL && link != ring; link = link->after) {
        PyObject *grant = (PyObject *)grant_of(link);
        /* One that nobody refers to is in the interpreter's queue of what is to be freed. */
        if (Py_REFCNT(grant) > 0 && PyList_Append(found, grant) < 0) {
            Py_CLEAR(found);
        }
    }
    return found;
}

static PyMemberDef holders_members[] = {
    {"count", T_LONGLONG, offsetof(Holders, count), READONLY, NULL},
    {NULL},
};

static PyMethodDef holders_methods[] = {
    {"add", holders_add, METH_O, NULL},
    {"discard", holders_discard, METH_O, NULL},
    {"snapshot", holders_snapshot, METH_NOARGS, NULL},
    {NULL},
};

static PyTypeObject Holders_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "membound_async._fast.Holders",
    .tp_basicsize = sizeof(Holders),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = holders_new,
    .tp_dealloc = holders_dealloc,
    .tp_members = holders_members,
    .tp_methods = holders_methods,
};

/* --- the two steps ----------------------------------------------------------------------- */

/* Whether a step may be taken now; see 1 and 2. Nothing that it has looked at changes until
 * Python code runs again. */
static bool is_open(Limiter *limiter)
{
    if (limiter->lock == NULL || (PyObject *)Py_TYPE(limiter->lock) != lock_type) {
        return false;
    }
    PyObject *locked = PyObject_CallMethodNoArgs(limiter->lock, str_locked);
    if (locked == NULL) {
        PyErr_Clear();
        return false;
    }
    Py_DECREF(locked); /* one of two that live for ever */
    return locked == Py_False && HAS_TYPE(limiter->ledger, Ledger) &&
           HAS_TYPE(((Ledger *)limiter->ledger)->waiters, Waiters);
}

static bool nobody_waits(Limiter *limiter)
{
    return ((Waiters *)((Ledger *)limiter->ledger)->waiters)->count == 0;
}

static long long positive(long long number)
{
    return number > 0 ? number : 0;
}

/* Whether the share allows drawing so much from the pool: q*(held + draw) <= p*(free + held). */
static bool fits(Ledger *ledger, long long held, long long draw)
{
    int p_overflow, q_overflow;
    if (ledger->p == NULL || !PyLong_CheckExact(ledger->p) || ledger->q == NULL ||
        !PyLong_CheckExact(ledger->q)) {
        return false;
    }
    __int128 p = PyLong_AsLongLongAndOverflow(ledger->p, &p_overflow);
    __int128 q = PyLong_AsLongLongAndOverflow(ledger->q, &q_overflow);
    __int128 wanted = (__int128)held + draw, pool = (__int128)ledger->free + held;
    return !p_overflow && !q_overflow && wanted <= LLONG_MAX && pool <= LLONG_MAX &&
           q * wanted <= p * pool;
}

/* What Ledger.admit() does while nobody waits. */
static bool admit(Ledger *ledger, Account *account, long long nbytes)
{
    long long moved, granted, all, held;
    if (ledger->closed || account->queue != Py_None || account->grouped ||
        __builtin_add_overflow(ledger->moved, nbytes, &moved) || moved > ledger->look_at ||
        __builtin_add_overflow(account->granted, nbytes, &granted) ||
        __builtin_add_overflow(granted, account->in_flight, &all) || all > account->firm_limit ||
        __builtin_add_overflow(positive(account->excess), account->in_flight, &held)) {
        return false;
    }
    long long draw = nbytes - positive(-account->excess);
    long long excess = (granted > account->live ? granted : account->live) - account->reserved;
    if (draw > 0) {
        if (!fits(ledger, held, draw)) {
            return false;
        }
        ledger->free += positive(account->excess) - positive(excess);
        if (ledger->free < ledger->lowest_free) {
            ledger->lowest_free = ledger->free;
        }
    }
    account->excess = excess;
    account->granted = granted;
    if (all > account->peak) {
        account->peak = all;
    }
    account->admissions++;
    ledger->moved = moved;
    return true;
}

/* The same in Python, which knows what it means for those who wait; -1 on an exception. */
static int admit_past_waiters(PyObject *limiter, PyObject *account, long long nbytes)
{
    PyObject *size = PyLong_FromLongLong(nbytes);
    PyObject *answer =
        size == NULL ? NULL : PyObject_CallMethodObjArgs(limiter, str_admit, account, size, NULL);
    int admitted = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(size);
    Py_XDECREF(answer);
    return admitted;
}

/* The task that runs in a loop of asyncio, or None; NULL on an exception. */
static PyObject *task_of(PyObject *loop)
{
    if (current_tasks == NULL) {
        return PyObject_CallOneArg(current_task, loop);
    }
    PyObject *task = PyDict_GetItemWithError(current_tasks, loop);
    if (task == NULL && PyErr_Occurred()) {
        return NULL;
    }
    return Py_NewRef(task == NULL ? Py_None : task);
}

/* Get a grant at once, for a block of the running task or for whoever will have it: 1 if it is
 * held now, 0 if Python must decide, -1 on an exception. */
static int take(Grant *self, bool for_block)
{
    PyObject *limiter = NULL, *account = NULL, *loop = NULL, *holders = NULL, *holder = NULL;
    struct timespec clock;
    int taken = 0;
    if (self->state != NEW || self->options != Py_None || self->component == NULL) {
        return 0;
    }
    if ((limiter = PyObject_GetAttr(self->component, str_limiter)) == NULL ||
        (account = PyObject_GetAttr(self->component, str_account)) == NULL ||
        (loop = PyObject_CallNoArgs(get_running_loop)) == NULL) {
        taken = -1;
        goto done;
    }
    Limiter *from = (Limiter *)limiter;
    if (!HAS_TYPE(limiter, Limiter) || !HAS_TYPE(account, Account) || loop != from->loop_token ||
        from->now != monotonic || clock_gettime(CLOCK_MONOTONIC, &clock) != 0) {
        goto done;
    }
    holders = Py_XNewRef(((Account *)account)->holders);
    if (holders == NULL || !Py_IS_TYPE(holders, &Holders_Type)) {
        goto done;
    }
    if (for_block && (holder = task_of(loop)) == NULL) {
        taken = -1;
        goto done;
    }
    double now = (double)(clock.tv_sec * 1000000000LL + clock.tv_nsec) / 1e9;
    if (now >= from->calm_until || !is_open(from) || self->state != NEW) {
        goto done;
    }
    taken = nobody_waits(from)
                ? admit((Ledger *)from->ledger, (Account *)account, self->wanted)
                : admit_past_waiters(limiter, account, self->wanted);
    if (taken > 0) {
        self->since = now;
        self->size = self->wanted;
        self->state = HELD;
        self->limiter = Py_NewRef(limiter);
        self->account = Py_NewRef(account);
        put_in((Holders *)holders, self);
        Py_XSETREF(self->holder, Py_XNewRef(holder));
    }
done:
    Py_XDECREF(limiter);
    Py_XDECREF(account);
    Py_XDECREF(loop);
    Py_XDECREF(holders);
    Py_XDECREF(holder);
    return taken;
}

/* Give back what take() has taken; false if Python must do it. */
static bool give_back(Grant *self)
{
    Limiter *limiter = (Limiter *)self->limiter;
    if (limiter == NULL || !is_open(limiter) || self->state != HELD || !nobody_waits(limiter) ||
        self->options != Py_None) {
        return false;
    }
    Ledger *ledger = (Ledger *)limiter->ledger;
    Account *account = (Account *)self->account;
    long long moved, granted = account->granted - self->size;
    if (granted < 0 || __builtin_add_overflow(ledger->moved, self->size, &moved)) {
        return false;
    }
    long long excess = (granted > account->live ? granted : account->live) - account->reserved;
    ledger->free += positive(account->excess) - positive(excess);
    ledger->moved = moved;
    account->excess = excess;
    account->granted = granted;
    self->size = 0;
    self->state = RELEASED;
    take_out(self);
    Py_CLEAR(self->holder);
    return true;
}

/* --- an awaitable that is over at once: what the end of a block gives -------------------- */

static PyObject *itself(PyObject *self)
{
    return Py_NewRef(self);
}

static PyObject *over_next(PyObject *Py_UNUSED(self))
{
    return NULL; /* which is StopIteration, if there is no other exception */
}

static PyAsyncMethods over_async = {.am_await = itself};

static PyTypeObject Over_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "membound_async._fast.Over",
    .tp_basicsize = sizeof(PyObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_as_async = &over_async,
    .tp_iter = itself,
    .tp_iternext = over_next,
};

static struct {
    PyObject_HEAD
} over = {PyObject_HEAD_INIT(&Over_Type)};

/* --- the grant --------------------------------------------------------------------------- */

static int grant_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"component", "nbytes", "options", NULL};
    PyObject *component, *nbytes, *options = Py_None;
    int overflow;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "OO|O:MemoryGrant", names, &component, &nbytes, &options)) {
        return -1;
    }
    long long wanted =
        PyLong_CheckExact(nbytes) ? PyLong_AsLongLongAndOverflow(nbytes, &overflow) : -1;
    if (wanted < 0 || wanted > max_bytes) { /* wanted is -1 as well if it overflows */
        PyObject *size = PyObject_CallFunction(parse_size, "Os", nbytes, "nbytes");
        wanted = size == NULL ? -1 : PyLong_AsLongLong(size);
        Py_XDECREF(size);
        if (wanted == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    Grant *grant = (Grant *)self;
    Py_XSETREF(grant->component, Py_NewRef(component));
    Py_XSETREF(grant->options, Py_NewRef(options));
    grant->wanted = wanted;
    return 0;
}

/* What to await: had at once, the grant itself; else the coroutine that gets it. */
static PyObject *get(PyObject *self, bool for_block)
{
    int taken = take((Grant *)self, for_block);
    if (taken == 0) {
        return PyObject_CallMethodNoArgs(self, for_block ? str_enter : str_acquire);
    }
    return taken > 0 ? Py_NewRef(self) : NULL;
}

static PyObject *grant_aenter(PyObject *self, PyObject *Py_UNUSED(unused))
{
    return get(self, true);
}

/* A grant that is held is the iterator of its own await, which is at its end. */
static PyObject *grant_await(PyObject *self)
{
    if (((Grant *)self)->state == HELD) {
        return Py_NewRef(self);
    }
    PyObject *awaitable = get(self, false), *iterator = NULL;
    if (awaitable == self) {
        return self;
    }
    if (awaitable != NULL && PyCoro_CheckExact(awaitable)) {
        iterator = Py_TYPE(awaitable)->tp_as_async->am_await(awaitable);
    }
    else if (awaitable != NULL) {
        PyErr_SetString(PyExc_TypeError, "_acquire() gave no coroutine");
    }
    Py_XDECREF(awaitable);
    return iterator;
}

static PyObject *grant_next(PyObject *self)
{
    PyErr_SetObject(PyExc_StopIteration, self);
    return NULL;
}

static PyObject *grant_aexit(PyObject *self, PyObject *const *Py_UNUSED(args), Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "__aexit__() takes 3 arguments");
        return NULL;
    }
    if (!give_back((Grant *)self)) {
        PyObject *done = PyObject_CallMethodNoArgs(self, str_release);
        if (done == NULL) {
            return NULL;
        }
        Py_DECREF(done);
    }
    return Py_NewRef((PyObject *)&over);
}

static void grant_finalize(PyObject *self)
{
    Grant *grant = (Grant *)self;
    if (grant->state == HELD || grant->state == ALONE) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        take_out(grant);
        PyObject *done = PyObject_CallMethodNoArgs(self, str_lost);
        if (done == NULL) {
            PyErr_WriteUnraisable(self);
        }
        Py_XDECREF(done);
        PyErr_Restore(type, value, traceback);
    }
}

COLLECTABLE(grant, 5)

static void grant_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    take_out((Grant *)self);
    if (((Grant *)self)->weakrefs != NULL) {
        PyObject_ClearWeakRefs(self);
    }
    grant_clear(self);
    Py_TYPE(self)->tp_free(self);
}

static PyMemberDef grant_members[] = {
    OBJECT(Grant, component, "_component"),
    OBJECT(Grant, options, "_options"),
    MEMBER(Grant, holder, "_holder", T_OBJECT), /* None where there is none */
    MEMBER(Grant, wanted, "_wanted", T_LONGLONG),
    MEMBER(Grant, size, "_size", T_LONGLONG),
    MEMBER(Grant, since, "_since", T_DOUBLE),
    MEMBER(Grant, state, "_state", T_INT),
    {NULL},
};

static PyMethodDef grant_methods[] = {
    {"__aenter__", grant_aenter, METH_NOARGS, NULL},
    {"__aexit__", (PyCFunction)(void (*)(void))grant_aexit, METH_FASTCALL, NULL},
    {NULL},
};

static PyAsyncMethods grant_async = {.am_await = grant_await};

static PyTypeObject Grant_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "membound_async._fast.GrantState",
    .tp_basicsize = sizeof(Grant),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = grant_init,
    .tp_traverse = grant_traverse,
    .tp_clear = grant_clear,
    .tp_finalize = grant_finalize,
    .tp_dealloc = grant_dealloc,
    .tp_weaklistoffset = offsetof(Grant, weakrefs),
    .tp_members = grant_members,
    .tp_methods = grant_methods,
    .tp_as_async = &grant_async,
    .tp_iternext = grant_next,
};

/* --- the module -------------------------------------------------------------------------- */

static PyObject *attribute(const char *module, const char *name)
{
    PyObject *from = PyImport_ImportModule(module);
    PyObject *found = from == NULL ? NULL : PyObject_GetAttrString(from, name);
    Py_XDECREF(from);
    return found;
}

static int fast_exec(PyObject *module)
{
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "the fast path is for the main interpreter");
        return -1;
    }
    const struct {
        PyObject **word;
        const char *text;
    } words[] = {
        {&str_account, "_account"}, {&str_acquire, "_acquire"}, {&str_admit, "_admit"},
        {&str_enter, "_enter"},     {&str_limiter, "_limiter"}, {&str_locked, "locked"},
        {&str_lost, "_lost"},       {&str_release, "_release"},
    };
    for (size_t i = 0; i < Py_ARRAY_LENGTH(words); i++) {
        if ((*words[i].word = PyUnicode_InternFromString(words[i].text)) == NULL) {
            return -1;
        }
    }
    PyTypeObject *types[] = {&Account_Type, &Waiters_Type, &Ledger_Type, &Limiter_Type,
                             &Grant_Type,   &Holders_Type, &Over_Type};
    for (size_t i = 0; i < Py_ARRAY_LENGTH(types); i++) {
        if (PyModule_AddType(module, types[i]) < 0) {
            return -1;
        }
    }
    PyObject *largest = attribute("membound_async.sizes", "MAX_BYTES");
    if (largest == NULL) {
        return -1;
    }
    max_bytes = PyLong_AsLongLong(largest);
    Py_DECREF(largest);
    if (max_bytes < 0 || (parse_size = attribute("membound_async.sizes", "parse_size")) == NULL ||
        (monotonic = attribute("time", "monotonic")) == NULL ||
        (get_running_loop = attribute("asyncio", "_get_running_loop")) == NULL ||
        (current_task = attribute("asyncio", "current_task")) == NULL ||
        (lock_type = attribute("_thread", "LockType")) == NULL) {
        return -1;
    }
    current_tasks = attribute("asyncio.tasks", "_current_tasks");
    if (current_tasks == NULL || !PyDict_CheckExact(current_tasks)) {
        PyErr_Clear();
        Py_CLEAR(current_tasks);
    }
    return 0;
}

static PyModuleDef_Slot fast_slots[] = {
    {Py_mod_exec, fast_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static PyModuleDef fast_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "membound_async._fast",
    .m_doc = "The fast path of a grant; see membound_async.fastpath.",
    .m_slots = fast_slots,
};

PyMODINIT_FUNC PyInit__fast(void)
{
    return PyModuleDef_Init(&fast_module);
}
