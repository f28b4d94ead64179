// The standard library comes compiled without instrumentation, and ThreadSanitizer does not see the order that a thread
// gets by waiting in it. These stand before the two functions in which threads wait for a mutex (the linker's --wrap),
// and tell. What does not wait is compiled with the program, and seen.

// ThreadSanitizer's.
void __tsan_acquire(void *address);
void __tsan_release(void *address);

void contended(void *mutex) __asm__("__real_" LOCK_CONTENDED);
void wrapped_contended(void *mutex) __asm__("__wrap_" LOCK_CONTENDED);
void wait(void *condvar, void *mutex) __asm__("__real_" CONDVAR_WAIT);
void wrapped_wait(void *condvar, void *mutex) __asm__("__wrap_" CONDVAR_WAIT);

// The mutex's first and only word is what the program's own code releases.
void wrapped_contended(void *mutex) {
  contended(mutex);
  __tsan_acquire(mutex);
}

void wrapped_wait(void *condvar, void *mutex) {
  __tsan_release(mutex);
  wait(condvar, mutex);
  __tsan_acquire(mutex);
}
