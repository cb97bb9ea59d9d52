// Marks in rows that tell who wrote them, and the search for them in saved files.
#ifndef VATTN_TESTS_API_ROW_MARKS_H_
#define VATTN_TESTS_API_ROW_MARKS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace vattn::test {

// Rows by author.
using MarkCounts = std::map<uint32_t, int64_t>;

// Marks fp32 rows [count][dim] of V: the first element is a value that no Gaussian gives, the
// second names the author, 1 to 65535.
void MarkRows(uint32_t author, int dim, std::vector<float>& rows);
// Adds the marks found in rows.
void CountMarks(const std::vector<float>& rows, MarkCounts& counts);
// At whatever byte they lie.
MarkCounts CountMarksOfFile(const std::string& path);

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_ROW_MARKS_H_
