// Segments of an index: runs of blocks whose keys are coded by tables of their own, so that an
// index follows its text. Their borders are the same for all KV heads of a layer.
//
// The last segment may be provisional: the tokens behind the last learnt one are too few to learn
// from, so they are coded by its tables about a centre of their own. The centre is made anew as
// those tokens grow (kRemadeShare); once they are enough, tables are learnt from them and they are
// coded again.
#ifndef VATTN_RUNTIME_INDEX_SEGMENTS_H_
#define VATTN_RUNTIME_INDEX_SEGMENTS_H_

#include <cstdint>
#include <vector>

namespace vattn {

// Tables of a segment are learnt from at least this many tokens ...
constexpr int64_t kLeastLearnt = 1024;
// ... or from this many, where the tables before misrepresent them.
constexpr int64_t kLeastFlooded = 256;
// A segment has at least this share of the tokens before it when it is learnt.
constexpr double kGrowthShare = 0.25;
// A provisional segment is made anew when its tokens have grown by this share.
constexpr double kRemadeShare = 0.125;
// So many of the kMaxSegments segments are kept for tokens that are enough to learn from. Sequences
// that go on from a shared prefix take a segment each, however few their own tokens are; these would
// leave none for a long text that comes after.
constexpr int kSparedSegments = 16;
// More outliers than this share of the provisional tokens are a reason to learn tables at once.
constexpr double kFloodShare = 0.01;

struct Segment {
  int64_t first_block = 0;
  // Tokens of the segment end here, of those that its tables or its centre were made from
  int64_t made_from = 0;
  bool provisional = false;
};

enum class Coding {
  kExtend,    // by the tables that are there
  kRecentre,  // the provisional segment's centre is made, or made anew
  kLearn      // tables are learnt for the segment
};

// What is to be done so that tokens up to `end` have codes.
struct CodingPlan {
  Coding coding = Coding::kExtend;
  int64_t begin = 0;        // tokens from here on are coded
  int64_t first_block = 0;  // of the segment that is made; it replaces a provisional one
  // A segment was due, but there are too many: the tokens are coded by the tables of the last one.
  bool refused = false;
};

// The token from which on a layer has no learnt tables, at the start of its block: what a segment that
// is made next may replace.
int64_t WithoutTables(const Segment& last);

// segments: those of the layer, in order. coded: tokens before it have codes, of which those in
// blocks before `first_own` lie in blocks that other sequences hold too and that keep their codes;
// both are token numbers, the second one a multiple of a block. end > sinks. growing: false for an
// index that has one segment only.
CodingPlan PlanCoding(const std::vector<Segment>& segments, int64_t sinks, int64_t coded,
                      int64_t first_own, int64_t end, bool growing);

// Leaves the segments of the first `coded` tokens. Allocates nothing.
void TrimSegments(int64_t coded, std::vector<Segment>& segments);
// Those segments.
std::vector<Segment> SegmentsOf(const std::vector<Segment>& segments, int64_t coded);

}  // namespace vattn

#endif  // VATTN_RUNTIME_INDEX_SEGMENTS_H_
