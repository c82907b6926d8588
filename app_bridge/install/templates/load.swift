// Package.swift (swift-tools-version 6.0 or newer): FOLDER lies in the folder of the target TARGET.
platforms: [.macOS("27.0"), .iOS("27.0")],
dependencies: [
    .package(url: "https://github.com/apple/coreai-models", revision: "REVISION"),
],
targets: [
    .target(
        name: "TARGET",
        dependencies: [.product(name: "CoreAILM", package: "coreai-models")],
        resources: [.copy("PATH")]
    ),
]

// In a file of the target:
import CoreAILanguageModels
import CoreGraphics
import Foundation
import FoundationModels

func load() async throws -> CoreAIVisionLanguageModel {
    guard let folder = Bundle.module.url(forResource: "FOLDER", withExtension: nil) else {
        throw CocoaError(.fileNoSuchFile)
    }
    return try await CoreAIVisionLanguageModel(resourcesAt: folder)
}

// A new session for each question: the engine takes the first picture and the questions of a whole session together,
// and neither instructions nor earlier answers.
func answer(_ question: String, about image: CGImage, by model: CoreAIVisionLanguageModel) async throws -> String {
    let session = LanguageModelSession(model: model)
    let response = try await session.respond {
        Prompt {
            Attachment(image)
            question
        }
    }
    return response.content
}
