// The choice of tile for the gradients of query and key on Hopper, by shared memory in bytes, without alignment and
// barriers (the limit of a block is 227 KB, 232,448):
//   Resident    E <= 64                98,304 + 256 C: C <= 512
//   Streamed    E <= 64, any C        212,992
//   Wide        E <= 128, any C       229,376
#pragma once

#include "cuda/position/wgmma/query_key_gradient_traits.cuh"

namespace segattn::cuda {

template <class Element>
struct WgmmaQueryKeyGradientTiles {
  using Resident = WgmmaQueryKeyGradientTraits<Element, 64, GradOutput::kResident>;
  using Streamed = WgmmaQueryKeyGradientTraits<Element, 64, GradOutput::kStreamed>;
  using Wide = WgmmaQueryKeyGradientTraits<Element, 128, GradOutput::kStreamed>;
};

// Calls visit.operator()<Traits>() with the tile for E = key_channels and C = value_channels; false if none fits.
template <class Element, class Visit>
bool with_wgmma_query_key_gradient_tile(int key_channels, int value_channels, int shared_limit, const Visit& visit) {
  using Tiles = WgmmaQueryKeyGradientTiles<Element>;
  const auto visit_if_fits = [&]<class Traits>() {
    if (key_channels > Traits::kKeyChannels || Traits::shared_bytes(value_channels) > shared_limit) {
      return false;
    }
    visit.template operator()<Traits>();
    return true;
  };
  return visit_if_fits.template operator()<typename Tiles::Resident>() ||
      visit_if_fits.template operator()<typename Tiles::Streamed>() ||
      visit_if_fits.template operator()<typename Tiles::Wide>();
}

}  // namespace segattn::cuda
