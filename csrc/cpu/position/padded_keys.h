// Position attention with a key padding mask. The keys and values that are not padding are copied without gaps, and the
// kernels run over these alone: padding costs no arithmetic, and whatever it holds is never read. The copies take as
// much memory as the keys and values of some samples, O(M).
//
// Samples have different numbers of keys. Consecutive ones with the same number are one call of the kernels: the heads
// of a picture, or pictures of the same size. Samples without padding are not copied.
#pragma once

#include <limits>
#include <vector>

#include "cpu/position/backward.h"
#include "cpu/position/forward.h"

namespace segattn::cpu {

class KeptKeys {
 public:
  // Consecutive samples with `keys` keys that are not padding.
  struct Run {
    std::int64_t first_sample, samples, keys;
  };

  // padding: (B, M)
  KeptKeys(const bool* padding, const PositionSizes& sizes) : sizes_(sizes), ends_(1, 0) {
    for (std::int64_t sample = 0; sample < sizes.batch; ++sample) {
      for (std::int64_t key = 0; key < sizes.keys; ++key) {
        if (!padding[sample * sizes.keys + key]) {
          kept_.push_back(key);
        }
      }
      ends_.push_back(static_cast<std::int64_t>(kept_.size()));
    }
  }

  // Calls use(run) for all samples.
  template <class Use>
  void for_each_run(const Use& use) const {
    for (std::int64_t first = 0, samples; first < sizes_.batch; first += samples) {
      const std::int64_t keys = keys_of(first);
      samples = 1;
      while (samples < most_samples(keys) && first + samples < sizes_.batch && keys_of(first + samples) == keys) {
        ++samples;
      }
      use(Run{first, samples, keys});
    }
  }

  // target (samples, channels, keys) = the keys of source (samples, channels, M) that are not padding
  template <class T>
  void gather(const Run& run, const T* source, std::int64_t channels, T* target) const {
    for_each_row(run, channels, [&](std::int64_t row, const std::int64_t* kept) {
      const T* const from = source + row * sizes_.keys;
      T* const to = target + row * run.keys;
      for (std::int64_t i = 0; i < run.keys; ++i) {
        to[i] = from[kept[i]];
      }
    });
  }

  // target (samples, channels, M) = source (samples, channels, keys) where there is no padding, else 0
  template <class T>
  void scatter(const Run& run, const T* source, std::int64_t channels, T* target) const {
    for_each_row(run, channels, [&](std::int64_t row, const std::int64_t* kept) {
      const T* const from = source + row * run.keys;
      T* const to = target + row * sizes_.keys;
      std::fill_n(to, sizes_.keys, T(0));
      for (std::int64_t i = 0; i < run.keys; ++i) {
        to[kept[i]] = from[i];
      }
    });
  }

 private:
  // Samples are copied together up to this number of elements.
  static constexpr std::int64_t kCopyLimit = std::int64_t{1} << 23;

  std::int64_t keys_of(std::int64_t sample) const { return ends_[sample + 1] - ends_[sample]; }

  std::int64_t most_samples(std::int64_t keys) const {
    const std::int64_t copied = keys == sizes_.keys ? 0 : keys * (sizes_.key_channels + sizes_.value_channels);
    return copied == 0 ? sizes_.batch : std::max<std::int64_t>(1, kCopyLimit / copied);
  }

  // Calls use(row, the kept keys of its sample) for the rows (sample, channel) of a run.
  template <class Use>
  void for_each_row(const Run& run, std::int64_t channels, const Use& use) const {
    constexpr std::int64_t kRows = 16;
    const std::int64_t rows = run.samples * channels;
    parallel_units(ceil_div(rows, kRows), 0, [&](std::int64_t unit, Scratch&) {
      for (std::int64_t row = unit * kRows; row < std::min(rows, (unit + 1) * kRows); ++row) {
        use(row, kept_.data() + ends_[run.first_sample + row / channels]);
      }
    });
  }

  PositionSizes sizes_;
  std::vector<std::int64_t> kept_;  // the kept keys of all samples
  std::vector<std::int64_t> ends_;  // [B + 1], where those of a sample end and those of the next begin
};

// padding: (B, M)
template <class T>
void attend_without_padding(const PositionForwardArguments<T>& arguments, const bool* padding) {
  const PositionSizes& sizes = arguments.sizes;
  const KeptKeys kept(padding, sizes);
  kept.for_each_run([&](const KeptKeys::Run& run) {
    PositionForwardArguments<T> part = arguments.of_samples(run.first_sample, run.samples);
    const bool copies = run.keys < sizes.keys;
    const std::int64_t keys = copies ? run.samples * run.keys : 0;
    const Buffer<T> key(keys * sizes.key_channels), value(keys * sizes.value_channels);
    if (copies) {
      kept.gather(run, part.key, sizes.key_channels, key.data());
      kept.gather(run, part.value, sizes.value_channels, value.data());
      part.key = key.data();
      part.value = value.data();
      part.sizes.keys = run.keys;
    }
    PositionForward<T>(part).run();
  });
}

// Memory for a gradient of the kept keys of a run.
template <class T>
class KeptGradient {
 public:
  // target: (samples, channels, M), the gradient of all keys
  KeptGradient(const PositionResult<T>& target, std::int64_t elements)
      : target_(target),
        rounded_(target.rounded == nullptr ? 0 : elements),
        accumulated_(target.accumulated == nullptr ? 0 : elements) {}

  PositionResult<T> result() const {
    return {
        target_.rounded == nullptr ? nullptr : rounded_.data(),
        target_.accumulated == nullptr ? nullptr : accumulated_.data()};
  }

  // Writes the gradient of all keys.
  void scatter(const KeptKeys& kept, const KeptKeys::Run& run, std::int64_t channels) const {
    if (target_.rounded != nullptr) {
      kept.scatter(run, rounded_.data(), channels, target_.rounded);
    } else if (target_.accumulated != nullptr) {
      kept.scatter(run, accumulated_.data(), channels, target_.accumulated);
    }
  }

 private:
  PositionResult<T> target_;
  Buffer<T> rounded_;
  Buffer<AccumulatorOf<T>> accumulated_;
};

// padding: (B, M). The gradients of padding, and of a sample with nothing else, are 0.
template <class T>
void differentiate_without_padding(const PositionBackwardArguments<T>& arguments, const bool* padding) {
  const PositionSizes& sizes = arguments.sizes;
  const KeptKeys kept(padding, sizes);
  kept.for_each_run([&](const KeptKeys::Run& run) {
    const PositionBackwardArguments<T> all = arguments.of_samples(run.first_sample, run.samples);
    if (run.keys == sizes.keys) {
      PositionBackward<T>(all).run();
      return;
    }
    const std::int64_t keys = run.samples * run.keys;
    const Buffer<T> key(keys * sizes.key_channels), value(keys * sizes.value_channels);
    const KeptGradient<T> grad_key(all.grad_key, keys * sizes.key_channels);
    const KeptGradient<T> grad_value(all.grad_value, keys * sizes.value_channels);
    kept.gather(run, all.key, sizes.key_channels, key.data());
    kept.gather(run, all.value, sizes.value_channels, value.data());
    PositionBackwardArguments<T> part = all;
    part.key = key.data();
    part.value = value.data();
    part.grad_key = grad_key.result();
    part.grad_value = grad_value.result();
    part.sizes.keys = run.keys;
    PositionBackward<T>(part).run();
    grad_key.scatter(kept, run, sizes.key_channels);
    grad_value.scatter(kept, run, sizes.value_channels);
  });
}

}  // namespace segattn::cpu
