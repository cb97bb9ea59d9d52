// Which sanitizer the program is compiled with. GCC says it by a macro, clang by __has_feature.
#ifndef VATTN_TESTS_MEMORY_SANITIZERS_H_
#define VATTN_TESTS_MEMORY_SANITIZERS_H_

#if !defined(__has_feature)
#define __has_feature(feature) 0
#endif

namespace vattn::test {

#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

}  // namespace vattn::test

#endif  // VATTN_TESTS_MEMORY_SANITIZERS_H_
