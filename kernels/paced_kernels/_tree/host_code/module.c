/* The priority tree on a CPU: writes, sums and draws with the bits of `arithmetic`, `bits` and `exact`.
 *
 * Addresses come from `host.py`, which checks shapes and data types.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "arithmetic.h"

#include "sums.h"

#include "writes.h"

#include "draws.h"

#include "race.h"

static int64_t integer(PyObject *given) { return (int64_t)PyLong_AsLongLong(given); }
static void *address(PyObject *given) { return (void *)(uintptr_t)PyLong_AsUnsignedLongLong(given); }

static Tree tree_of(PyObject *const *args) { /* leaf, sums, capacity */
    Tree tree;
    lay_out(&tree, address(args[0]), address(args[1]), integer(args[2]));
    return tree;
}

/* The random state of a draw, from seed, stream, step, size, status; the step is advanced. */
static State state_of(PyObject *const *args) {
    int64_t *step = address(args[2]);
    uint64_t seed = *(uint64_t *)address(args[0]), stream = *(uint64_t *)address(args[1]);
    State state = {philox_start(seed, stream, (uint64_t)*step), *(int64_t *)address(args[3]), address(args[4])};
    ++*step;
    return state;
}

static Drawn drawn_of(PyObject *const *args) { /* idx, q, prob, total */
    Drawn drawn = {address(args[0]), address(args[1]), address(args[3]), address(args[2])};
    return drawn;
}

static int takes(Py_ssize_t given, Py_ssize_t wanted) {
    if (given != wanted) PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", wanted, given);
    return given == wanted;
}

static PyObject *py_room(PyObject *self, PyObject *const *args, Py_ssize_t num) {
    Tree tree;
    if (!takes(num, 1)) return NULL;
    return PyLong_FromLongLong(lay_out(&tree, NULL, NULL, integer(args[0])));
}

static PyObject *py_update(PyObject *self, PyObject *const *args, Py_ssize_t num) {
    if (!takes(num, 10)) return NULL;
    Tree tree = tree_of(args);
    void *idx = address(args[3]), *weights = address(args[6]), *status = address(args[9]);
    int idx_kind = (int)integer(args[4]), kind = (int)integer(args[7]);
    int64_t start = integer(args[5]), count = integer(args[8]);
    Py_BEGIN_ALLOW_THREADS
    update(&tree, idx, idx_kind, start, weights, kind, count, status);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_rebuild(PyObject *self, PyObject *const *args, Py_ssize_t num) {
    if (!takes(num, 10)) return NULL;
    Tree tree = tree_of(args);
    void *from = address(args[3]), *allowed = address(args[8]), *status = address(args[9]);
    int kind = (int)integer(args[4]), is_bell = (int)integer(args[5]);
    Bell bell = {PyFloat_AsDouble(args[6]), PyFloat_AsDouble(args[7])};
    Py_BEGIN_ALLOW_THREADS
    rebuild(&tree, from, kind, is_bell ? &bell : NULL, allowed, status);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_sample(PyObject *self, PyObject *const *args, Py_ssize_t num) {
    if (!takes(num, 14)) return NULL;
    Tree tree = tree_of(args);
    int mode = (int)integer(args[3]);
    int64_t count = integer(args[4]);
    State state = state_of(args + 5);
    Drawn drawn = drawn_of(args + 10);
    Py_BEGIN_ALLOW_THREADS
    sample(&tree, mode, count, &state, &drawn);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_sample_distinct(PyObject *self, PyObject *const *args, Py_ssize_t num) {
    if (!takes(num, 15)) return NULL;
    Tree tree = tree_of(args);
    int is_race = (int)integer(args[3]), is_done;
    double exploration = PyFloat_AsDouble(args[4]);
    int64_t count = integer(args[5]);
    State state = state_of(args + 6);
    Drawn drawn = drawn_of(args + 11);
    Py_BEGIN_ALLOW_THREADS
    is_done = is_race ? race_distinct(&tree, count, exploration, &state, &drawn)
                      : first_distinct(&tree, count, &state, &drawn);
    Py_END_ALLOW_THREADS
    if (!is_done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* Whether the sums are those of the leaves; without memory to sum them again, an error. */
static PyObject *py_is_sound(PyObject *self, PyObject *const *args, Py_ssize_t num) {
    if (!takes(num, 3)) return NULL;
    Tree tree = tree_of(args), again;
    size_t entries = (size_t)lay_out(&again, tree.leaf, NULL, tree.capacity);
    int64_t *sums = calloc(entries, sizeof *sums);
    if (!sums) return PyErr_NoMemory();
    lay_out(&again, tree.leaf, sums, tree.capacity);
    for (int64_t i = 0; i < tree.capacity; i++) *again.num_live += tree.leaf[i] > 0;
    sum_levels(&again, 0);
    int is_sound = memcmp(sums, tree.num_live, entries * sizeof *sums) == 0;
    free(sums);
    return PyBool_FromLong(is_sound);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {
    METHOD(room), METHOD(update), METHOD(rebuild), METHOD(sample), METHOD(sample_distinct), METHOD(is_sound), {0},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_host", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__host(void) { return PyModule_Create(&module); }
