cimport cython

cpdef pick(candidates, random)

cdef class WeightedCycle:
    cdef readonly tuple weights
    cdef long long _total
    cdef list _current

    cpdef long next(self) except -2
