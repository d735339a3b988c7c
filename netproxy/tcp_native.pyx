# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""`Stream` over a TCP socket without the loop's transports: what `tcp.TcpStream` does, compiled.

Each loop has one `_Poller`: an epoll of its own, which the loop watches as one descriptor. When it is readable, all
sockets that are ready are read in one go, into one buffer, and their sinks called; what the sinks wrote is sent when
all of them have returned, one system call for a head and its content. So a request costs four system calls and no
object of the loop, and who is woken by one of them finds more to do; a stream that is idle costs some 200 octets.

Rules beyond those of `stream` and `tcp`:

* A socket is read only when its sink may be told, so nothing is ever held back here: what is not read waits in the
  kernel. Pausing costs nothing unless something arrives.
* A reset is noticed while reading is paused, unless there are octets before it: then it is told behind them.
* A turn handles at most `EVENTS` sockets and reads each of them once, then the loop has its turn.

Level-triggered throughout. A descriptor is registered while something is waited for, and not otherwise: ERR and HUP
come unasked and would make the loop spin.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.errno cimport EAGAIN, EINTR, EPIPE, errno

import asyncio
import os
import weakref

from netproxy.delivery cimport Delivery
from netproxy.stream cimport Stream

from netproxy.errors import LocalProtocolError
from netproxy.stream import HIGH_WATER

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)
    enum: EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL, EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    struct linger:
        int l_onoff
        int l_linger
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)
    int setsockopt(int fd, int level, int name, const void *value, unsigned int size)
    enum: MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SHUT_WR, SOL_SOCKET, SO_LINGER

cdef extern from "<netinet/in.h>" nogil:
    enum: IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    enum: TCP_NODELAY

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "Python.h":
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *octets, Py_ssize_t size) except NULL
    int _PyBytes_Resize(PyObject **octets, Py_ssize_t size) except -1

cdef extern from "<string.h>" nogil:
    void *memset(void *to, int octet, size_t size)
    void *memcpy(void *to, const void *source, size_t size)

cdef enum:
    EVENTS = 128  # sockets per turn
    BUFFER = 262144  # octets that are read at once, as uvloop does
    LARGE = 16384  # of a socket that brought so much the next read goes straight into the object that is handed on
    DIRECT = 65536
    VECTORS = 64
    JOINED = 4096

cdef char _buffer[BUFFER]


cdef object _os_error(int error):
    return OSError(error, os.strerror(error))


cdef class _Poller:
    """The sockets of one loop. Gone with the loop, which holds it by the reader that it added."""

    cdef object _loop_ref
    cdef object __weakref__
    cdef int _epoll
    cdef bint _in_turn
    cdef bint _scheduled
    cdef list _dirty
    cdef set _streams
    cdef list _ended

    def __cinit__(self):
        self._epoll = -1

    def __init__(self, loop):
        self._loop_ref = weakref.ref(loop)
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            raise _os_error(errno)
        self._dirty = []
        self._ended = []
        self._streams = set()
        loop.add_reader(self._epoll, self.turn)

    def __dealloc__(self):
        if self._epoll >= 0:
            close(self._epoll)

    cdef int watch(self, TcpStream stream, unsigned int wanted) except -1:
        cdef epoll_event event
        cdef int op, error
        if wanted == stream._watched:
            return 0
        event.events = wanted
        event.data.ptr = <void *>stream
        if not stream._watched:
            op = EPOLL_CTL_ADD
            self._streams.add(stream)  # epoll has its address
        elif not wanted:
            op = EPOLL_CTL_DEL
        else:
            op = EPOLL_CTL_MOD
        if epoll_ctl(self._epoll, op, stream._fd, &event) < 0:
            error = errno
            if op == EPOLL_CTL_ADD:
                self._streams.discard(stream)
            raise _os_error(error)
        stream._watched = wanted
        if not wanted:
            self.forget(stream)
        return 0

    cdef void forget(self, TcpStream stream):
        """The events of this turn may still name it, so it lives until the turn is over."""
        if self._in_turn:
            self._ended.append(stream)
        self._streams.discard(stream)

    cdef void mark(self, TcpStream stream):
        """It has something to send: when the callback that runs now is over."""
        stream._dirty = True
        self._dirty.append(stream)
        if not self._in_turn and not self._scheduled:
            self._scheduled = True
            loop = self._loop_ref()
            if loop is not None:
                loop.call_soon(self.flush_soon)

    def flush_soon(self):
        self._scheduled = False
        self.flush()

    cdef int flush(self) except -1:
        cdef list dirty
        cdef TcpStream stream
        while self._dirty:
            dirty = self._dirty
            self._dirty = []
            for stream in dirty:
                stream._dirty = False
                if stream._fd >= 0:
                    try:
                        stream.send_queue()
                    except Exception as exc:
                        stream.broken(exc)  # the others must not wait for ever
        return 0

    def turn(self):
        """The sockets that are ready now, each once."""
        cdef epoll_event events[EVENTS]
        cdef int i
        cdef int n = epoll_wait(self._epoll, events, EVENTS, 0)
        cdef TcpStream stream
        if n <= 0 or self._in_turn:
            return
        self._in_turn = True
        try:
            for i in range(n):
                stream = <TcpStream>events[i].data.ptr
                if not stream._watched:
                    continue  # by something that happened in this turn
                try:
                    stream.on_event(events[i].events)
                except Exception as exc:
                    stream.broken(exc)
        finally:
            self._in_turn = False
            self._ended.clear()
            if self._dirty:
                self.flush()


_pollers = weakref.WeakKeyDictionary()


cdef _Poller _poller_of(loop):
    cdef _Poller poller
    ref = _pollers.get(loop)
    poller = ref() if ref is not None else None
    if poller is None:
        poller = _Poller(loop)
        _pollers[loop] = weakref.ref(poller)
    return poller


cdef class TcpStream(Stream):
    """Made by `tcp.accepted` and `tcp.connected`. The socket has to be connected and non-blocking."""

    cdef object __weakref__
    cdef readonly Delivery delivery
    cdef _Poller _poller
    cdef int _fd
    cdef unsigned int _watched
    cdef list _queue
    cdef Py_ssize_t _queued
    cdef Py_ssize_t _sent  # of the first in the queue
    cdef Py_ssize_t _high_water
    cdef bint _dirty
    cdef bint _blocked
    cdef bint _eof
    cdef bint _hung
    cdef bint _large
    cdef bint _wrote_eof
    cdef bint _shut
    cdef bint _closing
    cdef bint _lost
    cdef object _error

    def __cinit__(self):
        self._fd = -1

    def __init__(self, loop, sock, sink=None, *, high_water=HIGH_WATER):
        """Owns the descriptor of `sock`, which is detached. Raises OSError, and `sock` is as it was."""
        cdef int yes = 1
        self._poller = _poller_of(loop)
        self._queue = []
        self._high_water = high_water
        self.delivery = Delivery(sink, self._more)
        sock.getpeername()
        self._fd = sock.detach()
        setsockopt(self._fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes))
        self._poller.watch(self, EPOLLIN)

    def __dealloc__(self):
        if self._fd >= 0:
            close(self._fd)

    def __repr__(self):
        ends = " eof" * self._eof + " wrote-eof" * self._wrote_eof + " closing" * self._closing
        return f"<TcpStream{ends} buffered={self._queued}>"

    # -- the owner's side ---------------------------------------------------------------------------

    @property
    def sink(self):
        return self.delivery.sink

    @sink.setter
    def sink(self, sink):
        self.delivery.replace(sink)

    @property
    def closing(self):
        return self._closing

    cpdef bint is_closing(self) except -1:
        return self._closing

    cpdef write(self, bytes data):
        """Dropped when the stream is closing: the peer's reset may always come first."""
        if self._closing:
            return
        if self._wrote_eof:
            raise LocalProtocolError("write after write_eof")
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        if not size:
            return
        self._queue.append(data)
        self._queued += size
        if not self._dirty and not self._watched & EPOLLOUT:
            if self._queued > self._high_water:
                self.send_queue()
            else:
                self._poller.mark(self)
        if self._queued > self._high_water and not self._blocked:
            if self._dirty:
                self.send_queue()
                if self._queued <= self._high_water or self._closing:
                    return
            self._blocked = True
            self.delivery.writable(False)

    cpdef write_eof(self):
        if self._wrote_eof or self._closing:
            return
        self._wrote_eof = True
        if not self._queue:
            self._shut_down()

    cpdef pause_reading(self):
        self.delivery.pause()

    cpdef resume_reading(self):
        self.delivery.resume()

    cpdef close(self):
        if self._closing:
            return
        self._closing = True
        self.delivery.stop()
        if self._queue and not self._watched & EPOLLOUT:
            self.send_queue()
        if self._fd < 0:
            return
        if not self._queue:
            self._let_go(None)
        else:
            self._watch()

    cpdef abort(self):
        cdef linger reset
        self._closing = True
        self.delivery.stop()
        if self._fd >= 0:
            reset.l_onoff = 1
            reset.l_linger = 0
            # A FIN would tell the peer that a truncated body was complete.
            setsockopt(self._fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset))
            self._let_go(None)

    cpdef Py_ssize_t buffered(self) except -1:
        return self._queued

    # -- the poller's side --------------------------------------------------------------------------

    cdef int on_event(self, unsigned int events) except -1:
        if events & EPOLLOUT and self._queue:
            self.send_queue()
            if self._fd < 0:
                return 0
        if events & (EPOLLIN | EPOLLERR | EPOLLHUP):
            if self._closing or self._eof:
                return 0  # it only sends, which tells what is wrong
            if self.delivery.ready:
                self._read()
            elif events & (EPOLLERR | EPOLLHUP):
                self._hang_up()
            else:
                self._watch()
        return 0

    cdef int _read(self) except -1:
        cdef bytes data
        cdef PyObject *direct
        cdef int error
        cdef ssize_t n
        if self._large:
            direct = new_bytes(NULL, DIRECT)
            n = recv(self._fd, PyBytes_AS_STRING(<object>direct), DIRECT, MSG_DONTWAIT)
            error = errno
            if n > 0:
                self._large = n >= LARGE
                if n < DIRECT:
                    _PyBytes_Resize(&direct, n)
                data = <bytes>direct
            Py_DECREF(<object>direct)
        else:
            n = recv(self._fd, _buffer, BUFFER, MSG_DONTWAIT)
            error = errno
            if n > 0:
                self._large = n >= LARGE
                data = PyBytes_FromStringAndSize(_buffer, n)
        if n > 0:
            self.delivery.target.data_received(data)
        elif n == 0:
            self._eof = True
            self._watch()
            self.delivery.eof()
        elif error != EAGAIN and error != EINTR:
            self._let_go(_os_error(error))
        return 0

    cdef int _hang_up(self) except -1:
        """The peer has reset while nobody listens (or ended, and so have we)."""
        cdef char octet
        cdef ssize_t n = recv(self._fd, &octet, 1, MSG_PEEK | MSG_DONTWAIT)
        cdef int error = errno
        if n < 0 and error != EAGAIN and error != EINTR:
            self._let_go(_os_error(error))
        else:
            self._hung = True
            self._watch()
        return 0

    def _more(self):
        self._hung = False
        if self._fd >= 0:
            self._watch()

    cdef int _watch(self) except -1:
        """Waits for what can be dealt with."""
        cdef unsigned int wanted = 0
        if not self._eof and not self._closing and not self._hung and self.delivery.ready:
            wanted = EPOLLIN
        if self._queue and not self._dirty:
            wanted |= EPOLLOUT
        if wanted != self._watched:
            self._poller.watch(self, wanted)
        return 0

    cdef int send_queue(self) except -1:
        """As much as the kernel takes; the rest when it says so."""
        cdef iovec vectors[VECTORS]
        cdef char joined[JOINED]
        cdef msghdr message
        cdef ssize_t n
        cdef int error
        cdef Py_ssize_t i, count, total
        cdef bytes data
        cdef list queue = self._queue
        if self._error is not None:
            return 0  # the end of the turn in which it failed: `_failed` reads first
        while queue:
            count = len(queue)
            data = <bytes>queue[0]
            if count > 1 and self._queued <= JOINED:
                # Copying costs less than telling the kernel of each piece.
                total = self._join(joined)
                n = send(self._fd, joined, total, MSG_DONTWAIT | MSG_NOSIGNAL)
            elif count == 1:
                total = PyBytes_GET_SIZE(data) - self._sent
                n = send(self._fd, PyBytes_AS_STRING(data) + self._sent, total, MSG_DONTWAIT | MSG_NOSIGNAL)
            else:
                if count > VECTORS:
                    count = VECTORS
                total = -self._sent
                for i in range(count):
                    data = <bytes>queue[i]
                    vectors[i].iov_base = PyBytes_AS_STRING(data)
                    vectors[i].iov_len = PyBytes_GET_SIZE(data)
                    total += PyBytes_GET_SIZE(data)
                vectors[0].iov_base = <char *>vectors[0].iov_base + self._sent
                vectors[0].iov_len -= self._sent
                memset(&message, 0, sizeof(message))
                message.msg_iov = vectors
                message.msg_iovlen = count
                n = sendmsg(self._fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if n == total and total == self._queued:
                self._queued -= n
                self._sent = 0
                queue.clear()
                break
            if n < 0:
                error = errno
                if error == EINTR:
                    continue
                if error != EAGAIN:
                    self._write_failed(_os_error(error))
                    return 0
                break
            self._took(n)
            if n < total:
                break
        if queue:
            if not self._watched & EPOLLOUT:
                self._poller.watch(self, self._watched | EPOLLOUT)
            if self._blocked and self._queued <= self._high_water // 4:
                self._unblock()
            return 0
        if self._watched & EPOLLOUT:
            self._poller.watch(self, self._watched & ~<unsigned int>EPOLLOUT)
        if self._blocked:
            self._unblock()
            if self._queue or self._fd < 0:
                return 0  # the sink wrote on, or closed
        if self._wrote_eof:
            self._shut_down()
        if self._closing:
            self._let_go(None)
        return 0

    cdef Py_ssize_t _join(self, char *out) except -1:
        """All that is queued, which is at most JOINED octets."""
        cdef Py_ssize_t skipped = self._sent
        cdef Py_ssize_t size
        cdef Py_ssize_t total = 0
        for data in self._queue:
            size = PyBytes_GET_SIZE(<bytes>data) - skipped
            memcpy(out + total, PyBytes_AS_STRING(<bytes>data) + skipped, size)
            total += size
            skipped = 0
        return total

    cdef int _took(self, ssize_t n) except -1:
        """The kernel has taken so many octets of the queue."""
        cdef Py_ssize_t size
        cdef Py_ssize_t whole = 0
        self._queued -= n
        n += self._sent
        for data in self._queue:
            size = PyBytes_GET_SIZE(<bytes>data)
            if n < size:
                break
            n -= size
            whole += 1
        self._sent = n
        del self._queue[:whole]
        return 0

    cdef int _unblock(self) except -1:
        self._blocked = False
        self.delivery.writable(True)
        return 0

    cdef int _shut_down(self) except -1:
        if not self._shut and self._fd >= 0:
            self._shut = True
            shutdown(self._fd, SHUT_WR)  # ENOTCONN: reset by the peer, which reading or `close` will tell
        return 0

    cdef int _write_failed(self, error) except -1:
        """Told in a turn of its own: the sink is in the middle of something."""
        if self._closing:
            self._let_go(error)
            return 0
        self._closing = True
        self._queue.clear()
        self._queued = self._sent = 0
        if self._watched:
            self._poller.watch(self, 0)
        self._error = error
        asyncio.get_running_loop().call_soon(self._failed)
        return 0

    def _failed(self):
        """What came before the reset is told first: so ends every upload that a server answers early."""
        try:
            self._read_rest()
        except Exception as exc:
            self.broken(exc)
        if self._fd >= 0:
            self._let_go(self._error)

    cdef int _read_rest(self) except -1:
        cdef Py_ssize_t left = BUFFER
        cdef ssize_t n
        while left > 0 and self._fd >= 0 and self.delivery.ready and not self._eof:
            n = recv(self._fd, _buffer, left, MSG_DONTWAIT)
            if n > 0:
                left -= n
                self.delivery.target.data_received(PyBytes_FromStringAndSize(_buffer, n))
                continue
            if n == 0 and self._error.errno == EPIPE:
                # A reset behind the peer's end; without one it is ECONNRESET (tcp_reset), and 0 says nothing.
                self._eof = True
                self.delivery.eof()
            break
        return 0

    def broken(self, exc):
        """The sink raised: a bug, for the loop to report; the connection can't go on."""
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "a stream's owner failed", "exception": exc})
        if self._fd >= 0:
            self.abort()

    cdef int _let_go(self, error) except -1:
        """The end: the descriptor goes now, the sink is told in a turn of its own."""
        cdef int fd = self._fd
        self._closing = True
        self._queue.clear()
        self._queued = self._sent = 0
        if self._watched:
            self._poller.watch(self, 0)
        self._fd = -1
        close(fd)
        if not self._lost:
            self._lost = True
            self._error = error
            self.delivery.stop()
            asyncio.get_running_loop().call_soon(self._tell)
        return 0

    def _tell(self):
        error, self._error = self._error, None
        self.delivery.lost(error)
