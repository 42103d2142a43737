// All nodes of all sequences, level by level (docs/definition.md, sections 1 and 6), forward and backward.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "../rows.h"

namespace lmn {

// A summarizer as a linear map of two stacks, as python_ref/tree.py has it.
struct LinearMerge {
  const at::Tensor &weight, &bias;  // [G, 1+k, 2C, C] ([G, 1+k, C, C] with a scale), [G, C]
  const std::optional<at::Tensor>& scale;  // [2, G, C]
};

at::Tensor build_tree(const at::Tensor& x, const LinearMerge& merge, const std::optional<at::Tensor>& token,
                      const std::optional<at::Tensor>& carried, const Rows& rows);

using TreeGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>,
                                 std::optional<at::Tensor>, std::optional<at::Tensor>>;

// With respect to x, weight, bias, scale, token and carried.
TreeGradients build_tree_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& nodes,
                                  const LinearMerge& merge, const std::optional<at::Tensor>& token, const Rows& rows);

}  // namespace lmn
