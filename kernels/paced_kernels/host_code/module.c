/* Products of bfloat16 with float32 results on a CPU that has units for them: instructions of AVX512_BF16.
 *
 * Addresses come from `_host_products.py`, which checks shapes and data types. Without such units, or a compiler that
 * knows them, `has_units` is False.
 */

#define _GNU_SOURCE /* RTLD_DEFAULT */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if defined(__linux__) && defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11))
#define HAS_CODE 1
#include <cpuid.h>
#include <dlfcn.h>
#include <immintrin.h>
#include <stdatomic.h>
#include <stdlib.h>

#define UNITS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

#include "pack.h"

#include "product.h"
#endif

#ifdef HAS_CODE
static int bits_are_set(unsigned value, unsigned bits) { return (value & bits) == bits; }

/* Whether the processor has the instructions, and the system keeps their registers. */
static int has_units(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bits_are_set(c, 1u << 27)) return 0; /* XGETBV may be asked */
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!bits_are_set(low, 0xe6)) return 0; /* registers of SSE, AVX and AVX-512 */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return 0;
    if (!bits_are_set(b, 1u << 16 | 1u << 30 | 1u << 31)) return 0; /* AVX512F, BW, VL */
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && bits_are_set(a, 1u << 5); /* AVX512_BF16 */
}
#else
static int has_units(void) { return 0; }
#endif

static PyObject *py_has_units(PyObject *self, PyObject *nothing) { return PyBool_FromLong(has_units()); }

#ifdef HAS_CODE
static int64_t integer(PyObject *given) { return (int64_t)PyLong_AsLongLong(given); }
static void *address(PyObject *given) { return (void *)(uintptr_t)PyLong_AsUnsignedLongLong(given); }

static Operand operand_of(PyObject *const *args) { /* address, is_float, strides along depth and side */
    Operand operand = {address(args[0]), (int)integer(args[1]), integer(args[2]), integer(args[3]), NULL};
    return operand;
}

/* left [m, k] and right [k, n] as `operand_of` reads them; the scale [k] of left; out and the stride of its rows; m, n, k,
 * adds, threads. */
static PyObject *py_multiply(PyObject *self, PyObject *const *args, Py_ssize_t num) {
    if (num != 16) return PyErr_Format(PyExc_TypeError, "takes 16 arguments, got %zd", num);
    Product whole = {operand_of(args),   operand_of(args + 4), address(args[9]),
                     integer(args[10]),  integer(args[11]),    integer(args[12]),
                     integer(args[13]),  (int)integer(args[14]), 0};
    whole.left.scale = address(args[8]);
    int64_t threads = integer(args[15]);
    int is_done;
    Py_BEGIN_ALLOW_THREADS
    is_done = multiply(whole, threads);
    Py_END_ALLOW_THREADS
    if (!is_done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}
#endif

static PyMethodDef methods[] = {
    {"has_units", py_has_units, METH_NOARGS, NULL},
#ifdef HAS_CODE
    {"multiply", (PyCFunction)(void (*)(void))py_multiply, METH_FASTCALL, NULL},
#endif
    {0},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_host", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__host(void) {
#ifdef HAS_CODE
    find_pool();
#endif
    return PyModule_Create(&module);
}
