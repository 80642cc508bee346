// Makes the shared library importable as gfnode_fast._C; importing it registers the operators.
#include <Python.h>

static PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module_definition); }
