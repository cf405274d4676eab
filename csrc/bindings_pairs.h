// The part of bindings.cpp that binds the pair kernels.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

void bind_pairs(pybind11::module_ &m);
