#include "plan.h"

#include <algorithm>
#include <numeric>

namespace lowbit {
namespace {

constexpr size_t kNoGroup = ~size_t{0};

template <class T>
bool contains(const std::vector<T>& items, const T& item) {
  return std::find(items.begin(), items.end(), item) != items.end();
}

// Gives every block the lowest offset at which no block that lives at the same time is in the way. Returns the total.
int64_t place(std::vector<Block*>& blocks) {
  std::stable_sort(blocks.begin(), blocks.end(), [](const Block* a, const Block* b) { return a->bytes > b->bytes; });
  int64_t total = 0;
  std::vector<const Block*> placed;  // by offset
  for (Block* block : blocks) {
    block->offset = 0;
    for (const Block* other : placed) {
      if (other->last < block->first || other->first > block->last) continue;
      if (block->offset + block->bytes <= other->offset) break;
      block->offset = std::max(block->offset, other->offset + other->bytes);
    }
    placed.insert(std::upper_bound(placed.begin(), placed.end(), block,
                                   [](const Block* a, const Block* b) { return a->offset < b->offset; }),
                  block);
    total = std::max(total, block->offset + block->bytes);
  }
  return total;
}

}  // namespace

Plan::Plan(const std::vector<Shape>& shapes, const std::vector<std::vector<size_t>>& inputs,
           const std::vector<std::unique_ptr<Op>>& ops, int64_t strip_bytes) {
  const Graph graph{shapes, inputs, ops, strip_bytes};
  make_groups(graph);
  find_homes(graph);
  place_values(graph);
}

// A pixelwise op follows the op, or a follower of the op, that runs last of those whose outputs it reads, if parts are
// the same to both. If that cannot be, it goes with the next group of such parts whose head is pixelwise, so that its
// output is there before that of a later convolution, which may join a sum of both.
void Plan::make_groups(const Graph& graph) {
  for (const auto& op : graph.ops) pixelwise_.push_back(dynamic_cast<const PixelwiseOp*>(op.get()));
  group_of_op_.assign(graph.ops.size(), kNoGroup);
  for (size_t i = 0; i < graph.ops.size(); ++i) {
    if (group_of_op_[i] != kNoGroup) continue;
    size_t last = 0;  // the number of groups up to the one that it can follow
    for (const size_t value : graph.inputs[i]) last = std::max(last, value == 0 ? 0 : group_of_op_[value - 1] + 1);
    if (const size_t number = group_before(graph, i, last); number != kNoGroup) {
      groups[number].followers.push_back(i);
      group_of_op_[i] = number;
      continue;
    }
    groups.push_back(group_from(graph, i));
    group_of_op_[i] = groups.size() - 1;
    for (const auto* members : {&groups.back().followers, &groups.back().pools})
      for (const size_t member : *members) group_of_op_[member] = groups.size() - 1;
  }
  for (Group& group : groups) {
    int64_t readers = 0;
    for (const auto& read : graph.inputs) readers += std::count(read.begin(), read.end(), group.head + 1);
    group.joined = readers == 1 && !group.followers.empty() &&
                   contains(graph.inputs[group.followers[0]], group.head + 1) &&
                   graph.ops[group.head]->joins(*pixelwise_[group.followers[0]]);
  }
}

// The group that op i can follow, which reads something of group number `last` - 1 and nothing of later ones.
size_t Plan::group_before(const Graph& graph, size_t i, size_t last) const {
  if (pixelwise_[i] == nullptr) return kNoGroup;
  const Shape& shape = graph.shapes[i + 1];
  for (size_t number = last > 0 ? last - 1 : 0; number < groups.size(); ++number) {
    const Group& group = groups[number];
    const Shape& other = graph.shapes[group.head + 1];
    const bool alike = other.height == shape.height && other.width == shape.width && other.channels == shape.channels;
    if (alike && group.strip_rows == 0 && (number + 1 == last || pixelwise_[group.head] != nullptr)) return number;
  }
  return kNoGroup;
}

// The group of a head, which works on strips if it can and should; if not, it has no others yet.
Group Plan::group_from(const Graph& graph, size_t head) const {
  const Shape& shape = graph.shapes[head + 1];
  if (!graph.ops[head]->makes_strips() || shape.bytes() <= 2 * graph.strip_bytes) return {head};
  Group group{head};
  std::vector<size_t> made{head + 1};
  int64_t fewest = 1;  // rows that let the pools go on
  for (size_t i = head + 1; i < graph.ops.size(); ++i) {
    const auto inside = [&](size_t value) { return contains(made, value); };
    const auto& read = graph.inputs[i];
    if (std::none_of(read.begin(), read.end(), inside)) continue;
    if (const auto* pool = dynamic_cast<const PoolOp*>(graph.ops[i].get())) {
      group.pools.push_back(i);
      fewest = std::max(fewest, pool->window.kernel[0]);
    } else if (pixelwise_[i] != nullptr && std::all_of(read.begin(), read.end(), inside) &&
               graph.shapes[i + 1].channels == shape.channels) {
      group.followers.push_back(i);
      made.push_back(i + 1);
    } else {
      return {head};
    }
  }
  group.strip_rows = std::max(fewest, graph.strip_bytes * shape.height / shape.bytes());
  if (group.pools.empty() || contains(made, graph.ops.size()) || group.strip_rows >= shape.height) return {head};
  return group;
}

void Plan::find_homes(const Graph& graph) {
  home_.resize(graph.shapes.size());
  std::iota(home_.begin(), home_.end(), size_t{0});
  const auto last_reader = [&](size_t value, size_t group, size_t op) {
    for (size_t i = 0; i < graph.ops.size(); ++i) {
      if (!contains(graph.inputs[i], value)) continue;
      const bool same = group_of_op_[i] == group;
      const bool spreads = i == groups[group].head && pixelwise_[i] == nullptr;  // beyond a part
      const bool later = i > op || spreads || contains(groups[group].pools, i);
      if (group_of_op_[i] > group || (same && later)) return false;
    }
    return true;
  };
  for (size_t group = 0; group < groups.size(); ++group)
    for (const size_t i : groups[group].followers) {
      std::vector<size_t> newest = graph.inputs[i];
      std::sort(newest.rbegin(), newest.rend());
      for (const size_t value : newest)
        if (graph.shapes[value] == graph.shapes[i + 1] && last_reader(value, group, i) &&
            !(groups[group].joined && value == groups[group].head + 1)) {
          home_[i + 1] = home_[value];
          break;
        }
    }
}

void Plan::place_values(const Graph& graph) {
  values_.resize(graph.shapes.size(), {0, 0, groups.size(), 0});
  const auto use = [&](size_t value, size_t group) {
    Block& block = values_[home_[value]];
    block.bytes = round_up(graph.shapes[home_[value]].bytes(), kAlignment);
    block.first = std::min(block.first, group);
    block.last = std::max(block.last, group);
  };
  use(0, 0);
  use(graph.ops.size(), groups.size());
  for (size_t i = 0; i < graph.ops.size(); ++i) {
    use(i + 1, group_of_op_[i]);
    for (const size_t value : graph.inputs[i]) use(value, group_of_op_[i]);
    thread_bytes = std::max<size_t>(thread_bytes, round_up(graph.ops[i]->thread_scratch_bytes(), kAlignment));
  }
  for (Group& group : groups)
    for (const size_t pool : group.pools)
      if (const size_t value = home_[graph.inputs[pool][0]]; !contains(group.pooled, value))
        group.pooled.push_back(value);
  std::vector<Block*> blocks;
  for (size_t group = 0; group < groups.size(); ++group) {
    const auto shorten = [&](size_t op) {
      const Shape& shape = graph.shapes[op + 1];
      values_[home_[op + 1]].bytes = round_up(groups[group].strip_rows * shape.width * shape.pixel_bytes(), kAlignment);
    };
    if (groups[group].strip_rows > 0) {
      shorten(groups[group].head);
      for (const size_t op : groups[group].followers) shorten(op);
    }
    if (groups[group].joined) values_[groups[group].head + 1].bytes = 0;
    scratch.push_back({round_up(graph.ops[groups[group].head]->scratch_bytes(), kAlignment), 0, group, group});
  }
  for (auto* kind : {&values_, &scratch})
    for (Block& block : *kind) blocks.push_back(&block);
  image_bytes = place(blocks);
}

}  // namespace lowbit
