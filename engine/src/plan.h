// What runs when, and where values live: made once, when a network is loaded.
#pragma once

#include <memory>
#include <vector>

#include "op.h"

namespace lowbit {

// An op, and pixelwise ops that follow it part by part, in order, while what they read is in the cache.
//
// Where pools are all else that reads what these make, and a whole image of it is much, they belong to the group too:
// it then works on strips of `strip_rows` rows, which are all of its values that is ever in memory, and the pools
// follow strip by strip.
struct Group {
  size_t head;
  std::vector<size_t> followers = {};
  std::vector<size_t> pools = {};
  std::vector<size_t> pooled = {};  // values, each in a block of its own, that hold what the pools read
  int64_t strip_rows = 0;
  bool joined = false;  // the head writes what its first follower makes of its output, and the output itself is nowhere
};

// A block of memory that is in use from group `first` to group `last`, both included; sizes and offsets are per image.
struct Block {
  int64_t bytes, offset;
  size_t first, last;
};

// Value 0 is the input, value i + 1 what op i writes.
class Plan {
 public:
  Plan() = default;
  Plan(const std::vector<Shape>& shapes, const std::vector<std::vector<size_t>>& inputs,
       const std::vector<std::unique_ptr<Op>>& ops, int64_t strip_bytes);

  const PixelwiseOp* pixelwise(size_t op) const { return pixelwise_[op]; }  // null for others
  const Group& group_of(size_t op) const { return groups[group_of_op_[op]]; }

  // A follower writes over what it is the last to read, so several values may share a block.
  const Block& block(size_t value) const { return values_[home_[value]]; }

  std::vector<Group> groups;   // in the order in which they run
  std::vector<Block> scratch;  // of groups
  int64_t image_bytes = 0;     // of all blocks
  size_t thread_bytes = 0;     // of scratch memory that each thread has

 private:
  struct Graph {
    const std::vector<Shape>& shapes;
    const std::vector<std::vector<size_t>>& inputs;
    const std::vector<std::unique_ptr<Op>>& ops;
    int64_t strip_bytes;
  };

  void make_groups(const Graph& graph);
  size_t group_before(const Graph& graph, size_t i, size_t last) const;
  Group group_from(const Graph& graph, size_t head) const;
  void find_homes(const Graph& graph);
  void place_values(const Graph& graph);

  std::vector<const PixelwiseOp*> pixelwise_;
  std::vector<size_t> group_of_op_, home_;
  std::vector<Block> values_;
};

}  // namespace lowbit
