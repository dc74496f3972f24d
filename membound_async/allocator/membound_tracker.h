/* Charging memory that CPython's allocators know nothing of to an allocation group, from C.
 *
 *     membound_tracker_api *tracker = membound_tracker_import();   (with the GIL, once)
 *     uint64_t group = tracker->current();                         (with the GIL)
 *     tracker->charge(group, nbytes);                              (from any thread)
 *     tracker->discharge(group, nbytes);
 *
 * `membound_async.allocator.get_include()` says where this file is.
 */
#ifndef MEMBOUND_TRACKER_H
#define MEMBOUND_TRACKER_H

#include <Python.h>
#include <stdint.h>

#define MEMBOUND_TRACKER_CAPSULE "membound_async.allocator._tracker._C_API"
#define MEMBOUND_TRACKER_VERSION 1

typedef struct {
    uint32_t version;
    /* The group of the current context. With the GIL; cannot fail. */
    uint64_t (*current)(void);
    /* Both from any thread, with the GIL or without; they take no lock. -1, and nothing has
     * changed: the group is gone, or more would be discharged than was charged; else 0. */
    int (*charge)(uint64_t group, size_t nbytes);
    int (*discharge)(uint64_t group, size_t nbytes);
} membound_tracker_api;

/* NULL with an exception set: there is no tracker, or it is of another version. */
static inline membound_tracker_api *
membound_tracker_import(void)
{
    PyObject *module = PyImport_ImportModule("membound_async.allocator._tracker");
    if (module == NULL)
        return NULL;
    PyObject *capsule = PyObject_GetAttrString(module, "_C_API");
    Py_DECREF(module);
    if (capsule == NULL)
        return NULL;
    membound_tracker_api *api = PyCapsule_GetPointer(capsule, MEMBOUND_TRACKER_CAPSULE);
    Py_DECREF(capsule);   /* the module has another reference */
    if (api != NULL && api->version != MEMBOUND_TRACKER_VERSION) {
        PyErr_Format(PyExc_ImportError, "membound_tracker.h is version %d, the tracker is %d",
                     MEMBOUND_TRACKER_VERSION, (int)api->version);
        return NULL;
    }
    return api;
}

#endif
